//! One file of an image, as the library is given it: all of its reads and writes pass here.
//!
//! The library writes an image's tables in an order that keeps it whole if the process ends, but
//! asks for no barrier between them, so a power cut could leave a table that points to what never
//! came to the disk. So the image is handed over twice, for its tables and for its data, and before
//! a write of a table all that was written before it is made durable. Tables are written rarely:
//! when clusters were allocated or given back.
//!
//! The library also keeps the file's size to itself and sets it, to make zeros at the end. Workers
//! write beside it (`host/qcow2.rs`), so here nothing cuts a file.
#![expect(
    unsafe_code,
    reason = "the library's trait has unsafe functions, and zeroing is a system call"
)]

use std::fmt::{self, Display, Formatter};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::sys::disk::DiskFile;
use crate::sys::witness::Witness;

use super::depth;
use super::trip::Trip;

/// What a file is to the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Tables, or a file that is only read.
    Tables,
    /// The clusters of the image that the guest writes to.
    Data,
}

/// A file, in one role.
#[derive(Debug)]
pub(super) struct Part {
    role: Role,
    file: Arc<File>,
    disk: Arc<DiskFile>,
    witness: Option<Arc<Witness>>,
    /// Something was written that may not be durable.
    dirty: Arc<AtomicBool>,
    trip: Trip,
}

impl Part {
    /// A file, for its tables, or for all of it when it is only read.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn new(disk: Arc<DiskFile>) -> io::Result<Part> {
        let file = File::try_from(disk.file().try_clone()?)?;
        Ok(Part {
            role: Role::Tables,
            file: Arc::new(file),
            trip: Trip::of(disk.file()),
            witness: disk.witness()?.map(Arc::new),
            disk,
            dirty: Arc::default(),
        })
    }

    /// The same file, for the data in it.
    pub(super) fn data(&self) -> Part {
        Part {
            role: Role::Data,
            file: Arc::clone(&self.file),
            disk: Arc::clone(&self.disk),
            witness: self.witness.clone(),
            dirty: Arc::clone(&self.dirty),
            trip: self.trip,
        }
    }

    /// Whether it is that image's file that the guest's data are in.
    pub(super) fn is_data(&self) -> bool {
        self.role == Role::Data
    }

    fn written(&self) {
        self.dirty.store(true, Ordering::Relaxed);
    }

    /// All that was written before is durable.
    fn settle(&self) -> io::Result<()> {
        if self.dirty.swap(false, Ordering::Relaxed) {
            let done = self.disk.file().sync_data();
            let done = done.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
            // A write of a queue may have been told instead (NFS).
            self.disk.heed(self.witness.as_deref());
            if let Err(errno) = self.disk.synced(done.map(|()| 0)) {
                self.written();
                return Err(io::Error::from_raw_os_error(errno));
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.written();
        let [offset, bytes] = [offset, bytes].map(libc::off_t::try_from);
        let (offset, bytes) = (
            offset.map_err(io::Error::other)?,
            bytes.map_err(io::Error::other)?,
        );
        let fd = self.disk.file().as_raw_fd();
        // SAFETY: the descriptor is open; the call touches no memory.
        match unsafe { libc::fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, offset, bytes) } {
            0 => Ok(()),
            _ => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    // The library writes zeros instead.
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                        Err(io::ErrorKind::Unsupported.into())
                    }
                    _ => Err(error),
                }
            }
        }
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.file, f)
    }
}

impl Storage for Part {
    fn mem_align(&self) -> usize {
        depth::check();
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.disk.bytes_now()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.trip.touch(offset, bufv.len());
        // SAFETY: the caller keeps what the function asks for.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.trip.touch(offset, bufv.len());
        if self.role == Role::Tables {
            self.settle()?;
        }
        self.written();
        // SAFETY: the caller keeps what the function asks for.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // Always: workers write too.
        self.written();
        self.settle()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }
}
