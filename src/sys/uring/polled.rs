//! A ring whose completions are polled for at the device (IORING_SETUP_IOPOLL), beside the ordinary
//! one: it takes reads and writes of files with direct I/O and nothing else, and tells nobody of a
//! completion, so that a worker must not sleep while something is in it.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::memory::Store;

use super::{FILES_MAX, Uring, enter};

/// How long the first read may take.
const PROBE_WITHIN: Duration = Duration::from_secs(2);
/// Bytes of it: a multiple of every block size.
const PROBE_BYTES: usize = 4096;

/// The second ring of a worker.
pub(super) struct Polled {
    pub(super) ring: IoUring,
    pub(super) in_flight: usize,
}

impl Polled {
    pub(super) fn new() -> io::Result<Polled> {
        let ring = build()?;
        ring.submitter().register_files_sparse(FILES_MAX)?;
        let in_flight = 0;
        Ok(Polled { ring, in_flight })
    }
}

fn build() -> io::Result<IoUring> {
    Uring::build(|builder| {
        builder
            .setup_iopoll()
            .setup_single_issuer()
            .setup_defer_taskrun();
    })
    .or_else(|_| {
        Uring::build(|builder| {
            builder.setup_iopoll();
        })
    })
}

/// Whether the device under `file` can be polled for completions: by reading its first block so.
///
/// # Errors
/// What the kernel says: EOPNOTSUPP where the device or the file system can't.
pub fn probe(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let mut ring = build()?;
    let store = Store::new(PROBE_BYTES as u64)?;
    let buffer = store.segment(0, PROBE_BYTES).base();
    let bytes = u32::try_from(PROBE_BYTES).unwrap_or(0);
    let read = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer, bytes).build();
    // SAFETY: the buffer is mapped until the read is complete; see below.
    unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
    let deadline = Instant::now() + PROBE_WITHIN;
    enter(&ring, 1, 0);
    loop {
        let done = ring.completion().next();
        if let Some(done) = done {
            let moved = done.result();
            return match moved {
                0.. => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
        }
        if Instant::now() > deadline {
            // The kernel may still write to it.
            core::mem::forget(store);
            return Err(io::ErrorKind::TimedOut.into());
        }
        enter(&ring, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn a_file_without_direct_io_can_not_be_polled() {
        let file = TempFile::new_in(std::path::Path::new("/dev/shm")).unwrap();
        file.as_file().set_len(8192).unwrap();
        let error = probe(file.as_file()).unwrap_err();
        let errno = error.raw_os_error();
        let known = [libc::EOPNOTSUPP, libc::EINVAL];
        assert!(errno.is_some_and(|errno| known.contains(&errno)), "{error}");
    }
}
