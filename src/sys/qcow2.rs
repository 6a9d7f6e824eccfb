//! qcow2 images through the `imago` library: opened with their backing files, read, written,
//! zeroed. One thread at a time, and everything may block; `host/qcow2.rs` has that thread.
//!
//! Nothing is guessed: an image is one because the operator says so, a backing file has the format
//! that the image names. What is told of a file that can't be served is told by path.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::io_buffers::IoBuffer;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, StorageExt};

use crate::memory::{Segment, copy};

use super::disk::{DiskError, DiskFile, DiskOptions, DiskReason, IoOptions};

mod depth;
mod header;
mod part;
mod trip;

use header::{HEADER_BYTES, Header};
use part::Part;

/// Bytes that one call reads or writes at most.
const BUFFER_BYTES: usize = 1 << 20;
/// What direct I/O asks of memory at most.
const BUFFER_ALIGN: usize = 4096;
/// Images on top of each other at most.
const CHAIN_MAX: usize = 64;

/// Whether the file begins as a qcow2 image does, which its guest may have written.
pub fn looks_like_qcow2(disk: &Arc<DiskFile>) -> bool {
    let start = Part::new(Arc::clone(disk)).and_then(|part| start_of(&part));
    start.is_ok_and(|start| header::is_qcow2(&start))
}

/// An open image.
pub struct Image {
    access: FormatAccess<Part>,
    buffer: IoBuffer,
    bytes: u64,
    cluster_bits: u32,
    read_only: bool,
    disk: Arc<DiskFile>,
}

impl core::fmt::Debug for Image {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Image")
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Opens the image `path` and what it stands on, which must lie in `backing_dir`; without that
    /// it may stand on nothing.
    ///
    /// # Errors
    /// [`DiskError`] names the file that is the reason, and the reason.
    pub fn open(
        (path, backing_dir): (&Path, Option<&Path>),
        options: DiskOptions,
        io: IoOptions,
    ) -> Result<(Image, Arc<DiskFile>), DiskError> {
        let named = |reason| DiskError {
            path: path.to_owned(),
            reason,
        };
        let buffer = IoBuffer::new(BUFFER_BYTES, BUFFER_ALIGN);
        let doing = "buffer";
        let mut buffer = buffer.map_err(|error| named(DiskReason::Failed { doing, error }))?;
        buffer.as_mut().into_slice().fill(0);
        let mut chain = Chain::new(backing_dir)?;
        let (access, header, disk) = open_layer(path, (options, io), &mut chain)?;
        let (bytes, block_size) = (header.bytes, options.block_size);
        if bytes == 0 {
            return Err(named(DiskReason::Empty));
        }
        if !bytes.is_multiple_of(block_size.into()) {
            return Err(named(DiskReason::Size { bytes, block_size }));
        }
        let image = Image {
            access,
            buffer,
            bytes,
            cluster_bits: header.cluster_bits,
            read_only: options.read_only,
            disk: Arc::clone(&disk),
        };
        Ok((image, disk))
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a cluster, as a power of two.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Reads from `offset` on into `segments`, or into as much of them as one call does.
    ///
    /// # Errors
    /// What the system or the image says.
    pub fn read(&mut self, offset: u64, segments: &[Segment]) -> io::Result<usize> {
        let bytes = bytes_of(segments).min(BUFFER_BYTES);
        let buffer = self.buffer.as_mut_range(0..bytes);
        let slice = buffer.into_slice();
        self.access.read(&mut *slice, offset)?;
        Ok(copy::write(segments, 0, slice))
    }

    /// Writes `segments` from `offset` on, or as much of them as one call does. Clusters that had
    /// to be allocated are in the image after [`Image::settle`].
    ///
    /// # Errors
    /// What the system or the image says.
    pub fn write(&mut self, offset: u64, segments: &[Segment]) -> io::Result<usize> {
        let bytes = bytes_of(segments).min(BUFFER_BYTES);
        let buffer = self.buffer.as_mut_range(0..bytes);
        let slice = buffer.into_slice();
        copy::read(segments, 0, slice);
        self.access.write(&*slice, offset)?;
        Ok(bytes)
    }

    /// Makes a range read as zeros; with `unmap` its clusters are given back to the image.
    ///
    /// # Errors
    /// What the system or the image says.
    pub fn zero(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let done = match unmap {
            true => self.access.discard_to_zero(offset, bytes),
            false => self.access.write_zeroes(offset, bytes),
        };
        match done {
            // Images of version 2 have no clusters of zeros.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.write_zeros(offset, bytes)
            }
            done => done,
        }
    }

    fn write_zeros(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut done = 0;
        while done < bytes {
            let part = usize::try_from(bytes - done).map_or(BUFFER_BYTES, |b| b.min(BUFFER_BYTES));
            let slice = self.buffer.as_mut_range(0..part).into_slice();
            slice.fill(0);
            self.access.write(&*slice, offset + done)?;
            done += part as u64;
        }
        Ok(())
    }

    /// Gives whole clusters of a range back, as far as the image can.
    ///
    /// # Errors
    /// What the system or the image says.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.access.discard_to_any(offset, bytes) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    /// The tables as they are now are in the file, in an order that no power cut spoils. Then what
    /// was written survives the end of the process.
    ///
    /// # Errors
    /// What the system says; whatever is not there yet is written by the next call.
    pub fn settle(&self) -> io::Result<()> {
        self.access.flush()
    }

    /// What is in the file is durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> io::Result<()> {
        match self.read_only {
            true => Ok(()),
            false => self.access.sync(),
        }
    }

    /// Where in the image's own file the cluster that begins at `offset` is, if it can be read and
    /// written there.
    pub fn place(&self, offset: u64) -> Option<u64> {
        let bytes = (1u64 << self.cluster_bits).min(self.bytes.saturating_sub(offset));
        let end = self.disk.bytes_now().ok()?;
        match self.access.get_mapping(offset, bytes).ok()? {
            (
                Mapping::Raw {
                    storage,
                    offset: at,
                    writable,
                    ..
                },
                length,
            ) => {
                let usable = storage.is_data() && (writable || self.read_only);
                // What is behind the end of the file reads as zeros, for the library.
                (usable && length >= bytes && at + bytes <= end).then_some(at)
            }
            _ => None,
        }
    }
}

fn bytes_of(segments: &[Segment]) -> usize {
    segments.iter().map(Segment::len).sum()
}

/// The library works on an image from here on, on this thread: it panics where it goes too deep.
pub fn begins_here() {
    depth::begins_here();
}

/// What the system said, as its number; the library keeps the kind only.
pub fn errno(error: &io::Error) -> i32 {
    match (error.raw_os_error(), error.kind()) {
        (Some(number), _) => number,
        (None, io::ErrorKind::StorageFull) => libc::ENOSPC,
        (None, io::ErrorKind::QuotaExceeded) => libc::EDQUOT,
        _ => libc::EIO,
    }
}

fn start_of(part: &Part) -> io::Result<[u8; HEADER_BYTES]> {
    // As long as direct I/O asks for.
    let mut buffer = IoBuffer::new(BUFFER_ALIGN, BUFFER_ALIGN)?;
    part.read(&mut buffer, 0)?;
    let mut start = [0; HEADER_BYTES];
    start.copy_from_slice(&buffer.as_ref().into_slice()[..HEADER_BYTES]);
    Ok(start)
}

fn refcounts_of(part: &Part, header: Header) -> io::Result<IoBuffer> {
    let (at, bytes) = header.refcounts;
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut table = IoBuffer::new(bytes, BUFFER_ALIGN)?;
    part.read(&mut table, at)?;
    Ok(table)
}

type Layer = (FormatAccess<Part>, Header, Arc<DiskFile>);

/// What is opened for a disk.
struct Chain {
    /// Where all but the first must lie, without links.
    dir: Option<PathBuf>,
    /// Device and inode of each file so far: those that stand on the next.
    above: Vec<(u64, u64)>,
}

impl Chain {
    fn new(dir: Option<&Path>) -> Result<Chain, DiskError> {
        let whole = |dir: &Path| {
            dir.canonicalize().map_err(|error| DiskError {
                path: dir.to_owned(),
                reason: DiskReason::Failed {
                    doing: "open backing_dir",
                    error,
                },
            })
        };
        Ok(Chain {
            dir: dir.map(whole).transpose()?,
            above: Vec::new(),
        })
    }

    /// The file `name` that the image `path` says it stands on, if it may. Whoever made the image
    /// has chosen that name.
    fn below(&self, path: &Path, name: &str) -> Result<PathBuf, DiskError> {
        let named = |path: &Path, reason| DiskError {
            path: path.to_owned(),
            reason,
        };
        let refused = |why| Err(named(path, DiskReason::Image(why)));
        let Some(dir) = &self.dir else {
            return refused(format!(
                "it stands on {name:?}, and which files may be read for an image is not for the \
                 image to say: backing_dir names the directory where they may lie"
            ));
        };
        let given = path.parent().unwrap_or(Path::new("")).join(name);
        let doing = "open";
        let failed = |error| named(&given, DiskReason::Failed { doing, error });
        let below = given.canonicalize().map_err(failed)?;
        if !below.starts_with(dir) {
            return refused(format!(
                "it stands on {name:?}, which is not in backing_dir = {dir:?}"
            ));
        }
        Ok(below)
    }
}

/// Opens an image and, below it, what it stands on.
fn open_layer(
    path: &Path,
    (options, io): (DiskOptions, IoOptions),
    chain: &mut Chain,
) -> Result<Layer, DiskError> {
    let named = |reason| DiskError {
        path: path.to_owned(),
        reason,
    };
    let failed = |doing| move |error| named(DiskReason::Failed { doing, error });
    let refused = |why: String| named(DiskReason::Image(why));
    let (disk, part) = open_file(path, (options, io), chain)?;
    let start = start_of(&part).map_err(failed("read"))?;
    let header = Header::parse(&start, disk.bytes()).map_err(refused)?;
    // What is only read has no clusters allocated in it.
    if !options.read_only {
        let refcounts = refcounts_of(&part, header).map_err(failed("read"))?;
        let sound = header.check_refcounts(refcounts.as_ref().into_slice(), disk.bytes());
        sound.map_err(refused)?;
    }
    let data = part.data();
    // A read-only image has its clusters found too; one that another stands on has not.
    let is_top = chain.above.len() == 1;
    let mut image = Qcow2::<Part>::open_image(part, !options.read_only)
        .map_err(|error| refused(error.to_string()))?;
    image.set_data_file(is_top.then_some(data));
    let name = image.implicit_backing_file().cloned();
    let format = image.implicit_backing_format().cloned();
    let backing = match name {
        None => None,
        Some(name) => {
            let below = chain.below(path, &name)?;
            let options = DiskOptions {
                read_only: true,
                ..options
            };
            tracing::info!("{path:?}: stands on {below:?}");
            let options = (options, IoOptions::default());
            Some(open_backing(&below, format.as_deref(), options, chain)?)
        }
    };
    image.set_backing(backing);
    Ok((FormatAccess::new(image), header, disk))
}

/// Opens what an image stands on.
fn open_backing(
    path: &Path,
    format: Option<&str>,
    options: (DiskOptions, IoOptions),
    chain: &mut Chain,
) -> Result<FormatAccess<Part>, DiskError> {
    let refused = |why: String| DiskError {
        path: path.to_owned(),
        reason: DiskReason::Image(why),
    };
    match format {
        Some("qcow2") => Ok(open_layer(path, options, chain)?.0),
        Some("raw") => {
            let (_, part) = open_file(path, options, chain)?;
            let raw = Raw::open_image(part, false).map_err(|error| refused(error.to_string()))?;
            Ok(FormatAccess::new(raw))
        }
        Some(other) => Err(refused(format!(
            "its format is {other:?}, known are qcow2 and raw"
        ))),
        None => Err(refused(
            "the image on it does not say which format this backing file has \
             (qemu-img rebase -u -b FILE -F FORMAT IMAGE does)"
                .to_owned(),
        )),
    }
}

/// Opens a file of a chain, which none above it may be.
fn open_file(
    path: &Path,
    (options, io): (DiskOptions, IoOptions),
    chain: &mut Chain,
) -> Result<(Arc<DiskFile>, Part), DiskError> {
    let named = |reason| DiskError {
        path: path.to_owned(),
        reason,
    };
    let failed = |doing| move |error| named(DiskReason::Failed { doing, error });
    let found = std::fs::metadata(path).map_err(failed("open"))?;
    let identity = (found.dev(), found.ino());
    if chain.above.contains(&identity) || chain.above.len() >= CHAIN_MAX {
        let why = match chain.above.contains(&identity) {
            true => "it stands on itself".to_owned(),
            false => format!("more than {CHAIN_MAX} images stand on each other"),
        };
        return Err(named(DiskReason::Image(why)));
    }
    chain.above.push(identity);
    let disk = Arc::new(DiskFile::open_image(path, options)?.with_io(path, io));
    let part = Part::new(Arc::clone(&disk)).map_err(failed("open"))?;
    Ok((disk, part))
}
