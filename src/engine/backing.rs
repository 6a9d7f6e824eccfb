//! `Backing`: where the blocks of a disk are, and what serves a queue of it.

use std::sync::Arc;

use crate::host::null::NullDisk;
use crate::host::qcow2::Qcow2Image;
use crate::host::ram::RamDisk;
use crate::host::uring::UringDisk;
use crate::memory::Store;
use crate::sys::disk::DiskFile;
use crate::sys::key::DiskKey;

use super::disk::{EncryptedDisk, HostDisk, IN_FLIGHT_MAX};
use super::worker::UringNeed;

/// How a disk is encrypted.
#[derive(Debug, Clone)]
pub struct Encryption {
    /// With what.
    pub key: Arc<DiskKey>,
    /// Bytes of a sector, which is encrypted as one: no more than the disk's block size.
    pub sector: u32,
}

/// Where the blocks of a disk are.
#[derive(Debug, Clone)]
pub enum Backing {
    /// A file or block device.
    File(Arc<DiskFile>),
    /// A file or block device with ciphertext on it.
    Encrypted(Arc<DiskFile>, Encryption),
    /// A qcow2 image.
    Qcow2(Arc<Qcow2Image>),
    /// Memory of the daemon.
    Ram(Arc<Store>),
    /// Nowhere.
    Null,
}

impl Backing {
    /// What serves one queue of it.
    pub(super) fn queue(&self) -> HostDisk {
        match self {
            Backing::File(file) => HostDisk::Uring(UringDisk::new(Arc::clone(file))),
            Backing::Encrypted(file, how) => {
                let disk = UringDisk::new(Arc::clone(file));
                HostDisk::Encrypted(EncryptedDisk::new(disk, how.clone()))
            }
            Backing::Qcow2(image) => HostDisk::Qcow2(Box::new(image.queue(IN_FLIGHT_MAX))),
            Backing::Ram(store) => {
                HostDisk::Ram(RamDisk::new(Arc::clone(store), IN_FLIGHT_MAX.into()))
            }
            Backing::Null => HostDisk::Null(NullDisk::new(IN_FLIGHT_MAX.into())),
        }
    }

    pub(super) fn uring(&self) -> UringNeed {
        match self {
            Backing::File(file) | Backing::Encrypted(file, _) => UringNeed::of(file.io()),
            Backing::Qcow2(image) => UringNeed::of(image.io()),
            Backing::Ram(_) | Backing::Null => UringNeed::Nothing,
        }
    }
}
