//! What the kernel tells of data in its page cache that it could not write.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A handle of a file of its own, to ask by whether data were lost. The kernel tells each handle
/// once: of two syncs by one handle at the same time, one is told, and the other succeeds.
#[derive(Debug)]
pub struct Witness(File);

impl Witness {
    /// Another handle of `file`. It knows of what nobody has been told yet, and of what comes.
    ///
    /// # Errors
    /// What the system says, also when it would not answer.
    pub fn of(file: &File) -> io::Result<Witness> {
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        match range(&file, 0) {
            0 => Ok(Witness(file)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Asks whether data were lost since it was asked last. Writes nothing and waits for nothing.
    ///
    /// # Errors
    /// The error number that they were lost with.
    pub fn ask(&self) -> Result<(), i32> {
        match range(&self.0, libc::SYNC_FILE_RANGE_WAIT_BEFORE) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)),
        }
    }
}

/// sync_file_range(2). The errors of the whole file are told with any range; this one has no page.
fn range(file: &File, flags: libc::c_uint) -> libc::c_int {
    // SAFETY: the descriptor is open; the call touches no memory.
    unsafe { libc::sync_file_range(file.as_raw_fd(), i64::MAX - 1, 1, flags) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn nothing_is_told_where_nothing_was_lost() {
        let file = TempFile::new().unwrap();
        let witness = Witness::of(file.as_file()).unwrap();
        std::fs::write(file.as_path(), [1; 5000]).unwrap();
        assert_eq!(witness.ask(), Ok(()));
        file.as_file().sync_all().unwrap();
        assert_eq!(witness.ask(), Ok(()));
    }

    #[test]
    fn what_can_not_be_asked_is_an_error() {
        let device = File::open("/dev/null").unwrap();
        let refused = Witness::of(&device).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ESPIPE));
    }
}
