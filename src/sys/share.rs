//! What a front-end of ours needs from the kernel: memory that a back-end can map, and a
//! connection that is made or refused at once.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::socket;

/// Bytes of the pages that [`memory`] asks for where the machine has some to give.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Memory without a name, `bytes` zero bytes of it, in pages of 2 MiB or of the machine's own size.
/// Huge pages are taken at once, so that a later touch can't fail; `bytes` has to be whole pages.
///
/// # Errors
/// What the kernel says, above all that it has no huge pages left.
pub fn memory(bytes: u64, huge: bool) -> io::Result<File> {
    let pages = if huge {
        libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
    } else {
        0
    };
    // SAFETY: the name is a C string; the call has no other argument in memory.
    let fd = unsafe { libc::memfd_create(c"vringd-bench".as_ptr(), libc::MFD_CLOEXEC | pages) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let length = bytes
        .try_into()
        .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no pointers are passed.
    if huge && unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A connection to the Unix stream socket of this name. Never waits: a listener whose queue is full
/// is an error, and so is one that is gone.
///
/// # Errors
/// What the kernel says.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let connection = socket::create()?;
    socket::connect(connection.as_fd(), path)?;
    let stream = UnixStream::from(connection);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixListener;

    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn memory_has_its_size_and_can_be_written() {
        let file = memory(8192, false).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 8192);
        file.write_all_at(b"end", 8189).unwrap();
    }

    #[test]
    fn a_connection_is_made_or_refused_at_once() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        connect(&path).unwrap();
        drop(listener);
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
