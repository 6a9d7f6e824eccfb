//! Locks on images, in QEMU's way: who uses an image for what shows in locks on single bytes of it
//! (docs/operations.md). All are shared locks of an open file description; somebody's use is in the
//! way where the kernel would refuse an exclusive lock. Nobody waits for a lock.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Byte of the first use that is made of an image.
const USED: i64 = 100;
/// Byte of the first use that others must not make of it.
const NOT_SHARED: i64 = 200;

/// Reads what was written before.
const READ: i64 = 0;
/// Writes.
const WRITE: i64 = 1;

/// Why an image can't be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else writes to it.
    #[error("another process writes to it, or another disk of this one")]
    Written,
    /// Somebody else does not want it to be written to.
    #[error("another process uses it, or another disk of this one, and allows nobody to write")]
    Used,
    /// A system call failed.
    #[error("lock: {0}")]
    Failed(io::Error),
    /// The file system has no such locks.
    #[error("the file system has no locks: {0}")]
    None(io::Error),
}

/// Locks `file`, for as long as it is open: nobody else may write to it. With `write` we do, which
/// nobody else must have ruled out.
///
/// # Errors
/// [`LockError`]; then nothing is locked once `file` is closed.
pub(super) fn lock(file: &File, write: bool) -> Result<(), LockError> {
    let own = if write { &[READ, WRITE][..] } else { &[READ] };
    let taken = own.iter().map(|action| USED + action);
    for byte in taken.chain([NOT_SHARED + WRITE]) {
        request(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map_err(failed)?;
    }
    // Only now: of two that begin together, at least one sees the other.
    if is_taken(file, USED + WRITE)? {
        return Err(LockError::Written);
    }
    for action in own {
        if is_taken(file, NOT_SHARED + action)? {
            return Err(LockError::Used);
        }
    }
    Ok(())
}

/// Whether somebody else has a lock on `byte`.
fn is_taken(file: &File, byte: i64) -> Result<bool, LockError> {
    let found = request(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_err(failed)?;
    Ok(found != libc::F_UNLCK)
}

fn failed(error: io::Error) -> LockError {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            LockError::None(error)
        }
        _ => LockError::Failed(error),
    }
}

/// Asks for a lock of kind `kind` on one byte. Returns the kind that the kernel answers with.
fn request(file: &File, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<i32> {
    // SAFETY: all-zero bytes are a valid `flock`.
    let mut lock: libc::flock = unsafe { core::mem::zeroed() };
    let short = |number: libc::c_int| libc::c_short::try_from(number).unwrap_or(0);
    lock.l_type = short(kind);
    lock.l_whence = short(libc::SEEK_SET);
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: `lock` is valid and writable; l_pid is 0, as these commands demand.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn one_writer_or_many_readers() {
        let image = TempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            options.read(true).write(true);
            options.open(image.as_path()).unwrap()
        };
        let reader = open();
        lock(&reader, false).unwrap();
        lock(&open(), false).unwrap();
        let refused = lock(&open(), true).unwrap_err();
        assert!(matches!(refused, LockError::Used), "{refused}");
        drop(reader);
        let writer = open();
        lock(&writer, true).unwrap();
        for write in [true, false] {
            let refused = lock(&open(), write).unwrap_err();
            assert!(matches!(refused, LockError::Written), "{refused}");
        }
        drop(writer);
        lock(&open(), true).unwrap();
    }
}
