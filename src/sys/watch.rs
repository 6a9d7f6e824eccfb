//! `SizeWatch`: a descriptor that becomes readable when a disk may have another size.
//!
//! A regular file is watched by inotify(7), for the end of other programs' writing: whoever makes a
//! file larger opens it for that (`truncate`, `fallocate`, `qemu-img resize`), and closes it. To be
//! told of each change would cost each write of the guest an event. Everything else (truncate(2)
//! of a path, another machine's change of a file on a network, a block device) is seen when
//! somebody says that it is worth a look.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Room for many events: without names they have 16 bytes each.
const BUFFER: usize = 4096;

/// What to wait for.
#[derive(Debug)]
pub struct SizeWatch {
    notes: Option<OwnedFd>,
    asked: EventFd,
    both: Epoll,
}

impl SizeWatch {
    /// Readable when it was asked for ([`SizeWatch::bell`]).
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<SizeWatch> {
        let watch = SizeWatch {
            notes: None,
            asked: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            both: Epoll::new()?,
        };
        watch.add(watch.asked.as_raw_fd())?;
        Ok(watch)
    }

    /// Readable also when another program has written to `file`, and closed it.
    ///
    /// # Errors
    /// What the system said; then it is not watched.
    pub fn follow(&mut self, file: &File) -> io::Result<()> {
        // SAFETY: no pointers.
        let notes = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        if notes < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
        let notes = unsafe { OwnedFd::from_raw_fd(notes) };
        // The file that is open, whatever has become of its name.
        let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        let what = libc::IN_CLOSE_WRITE | libc::IN_ATTRIB;
        // SAFETY: `path` ends with a NUL and is read during the call only.
        let added =
            unsafe { libc::inotify_add_watch(notes.as_raw_fd(), path.as_ptr().cast(), what) };
        if added < 0 {
            return Err(io::Error::last_os_error());
        }
        self.add(notes.as_raw_fd())?;
        self.notes = Some(notes);
        Ok(())
    }

    fn add(&self, fd: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.both.ctl(ControlOperation::Add, fd, event)
    }

    /// What asks for a look when it is written to.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn bell(&self) -> io::Result<EventFd> {
        self.asked.try_clone()
    }

    /// Not readable after this, until there is more.
    pub fn clear(&self) {
        // Empty: it was the other one.
        let _ = self.asked.read();
        let Some(notes) = &self.notes else { return };
        let mut buffer = [0u8; BUFFER];
        loop {
            // SAFETY: `buffer` is writable for its length.
            let read =
                unsafe { libc::read(notes.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            if read <= 0 {
                return;
            }
        }
    }
}

/// To wait with.
impl AsRawFd for SizeWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.both.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::super::socket::is_readable_within;
    use vmm_sys_util::tempfile::TempFile;

    const NOW: Duration = Duration::ZERO;
    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn others_changes_and_questions_are_seen_and_own_writes_are_not() {
        let file = TempFile::new().unwrap();
        let mut watch = SizeWatch::new().unwrap();
        watch.follow(file.as_file()).unwrap();
        let readable = |within| is_readable_within(&watch, within).unwrap();
        file.as_file().write_at(&[1; 4096], 0).unwrap();
        file.as_file().set_len(8192).unwrap();
        assert!(!readable(NOW), "our own writes");
        let open = || OpenOptions::new().write(true).open(file.as_path()).unwrap();
        for _ in 0..2 {
            let other = open();
            other.set_len(16384).unwrap();
            assert!(!readable(NOW));
            drop(other);
            assert!(readable(SOON));
            watch.clear();
            assert!(!readable(NOW));
        }
        watch.bell().unwrap().write(1).unwrap();
        assert!(readable(SOON));
        watch.clear();
        assert!(!readable(NOW));
        // A file without a name is watched, too.
        let named = file.as_path().to_owned();
        let other = open();
        std::fs::remove_file(named).unwrap();
        watch.clear();
        drop(other);
        assert!(readable(SOON));
    }
}
