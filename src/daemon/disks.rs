//! Disks whose blocks are in a file or a block device: what is opened for them, and what of it the
//! guest is told.

use std::path::Path;
use std::sync::Arc;

use crate::config::{BlkConfig, EncryptConfig, ImageFormat};
use crate::device::blk::{BlkTopology, RangeLimits};
use crate::engine::{Backing, Encryption};
use crate::host::qcow2::Qcow2Image;
use crate::sys::disk::{DiskError, DiskFile, DiskOptions};
use crate::sys::key::DiskKey;
use crate::sys::qcow2::looks_like_qcow2;

use super::DaemonError;

/// What an image's clusters are written in, as far as the guest is concerned.
const IMAGE_BLOCK: u32 = 4096;

/// An open disk.
pub(super) struct Opened {
    pub(super) backing: Backing,
    pub(super) bytes: u64,
    pub(super) ranges: RangeLimits,
    pub(super) topology: BlkTopology,
}

/// Opens the file or block device `path` for the disk `blk`.
pub(super) fn open(blk: &BlkConfig, path: &Path) -> Result<Opened, DaemonError> {
    let options = DiskOptions {
        read_only: blk.read_only,
        direct: blk.direct,
        block_size: blk.block_size,
        lock: blk.lock,
    };
    let named = |source: DiskError| DaemonError::Disk {
        name: blk.name.clone(),
        source,
    };
    if let ImageFormat::Qcow2 { backing_dir } = &blk.format {
        let backing_dir = backing_dir.as_deref();
        let image = Qcow2Image::open(&blk.name, (path, backing_dir), options, blk.io);
        let image = image.map_err(named)?;
        return Ok(qcow2(blk, image));
    }
    let file = DiskFile::open(path, options).map_err(named)?;
    let bytes = file.bytes();
    let told = file.topology();
    let topology = BlkTopology::from_bytes(
        blk.block_size,
        told.physical_block,
        told.offset,
        told.min_io,
        told.opt_io,
    );
    let mut ranges = RangeLimits::file(told.discard_align, told.discard_max);
    // Zeros are written there, as ciphertext.
    ranges.zero_unmaps = blk.encrypt.is_none();
    let file = Arc::new(file.with_io(path, blk.io));
    if blk.format == ImageFormat::Plain && blk.encrypt.is_none() && looks_like_qcow2(&file) {
        tracing::warn!(
            "blk {}: path = {path:?} begins as a qcow2 image does, and is served as it is: \
             format = \"qcow2\" serves the disk in it, format = \"raw\" says that this is meant",
            blk.name
        );
    }
    let backing = match &blk.encrypt {
        None => Backing::File(file),
        Some(how) => Backing::Encrypted(file, encryption(&blk.name, how)?),
    };
    Ok(Opened {
        backing,
        bytes,
        ranges,
        topology,
    })
}

fn qcow2(blk: &BlkConfig, image: Qcow2Image) -> Opened {
    let cluster = image.cluster_bytes();
    let block = IMAGE_BLOCK.max(blk.block_size);
    Opened {
        bytes: image.bytes(),
        ranges: RangeLimits::file(cluster.max(block), u64::MAX),
        topology: BlkTopology::from_bytes(blk.block_size, block, 0, cluster.max(block), 0),
        backing: Backing::Qcow2(Arc::new(image)),
    }
}

/// Reads the key of the disk `name`.
fn encryption(name: &str, how: &EncryptConfig) -> Result<Encryption, DaemonError> {
    let key = DiskKey::load(&how.key).map_err(|source| DaemonError::Key {
        name: name.to_owned(),
        source,
    })?;
    let sector = how.sector;
    tracing::info!("blk {name}: encrypted with aes-256-xts in sectors of {sector} bytes");
    let key = Arc::new(key);
    Ok(Encryption { key, sector })
}
