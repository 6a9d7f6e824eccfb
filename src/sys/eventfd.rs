//! eventfds that a front-end passed: checked for what they are before anything is written to them.
//!
//! A blocking descriptor in the place of a call fd would let a hostile front-end stop a worker, and
//! a file would be written to. See eventfd(2) and proc(5) on /proc/PID/fd.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// What the kernel calls an eventfd.
const LINK: &str = "anon_inode:[eventfd]";

/// Takes `file` over as an eventfd that never blocks and is not inherited.
///
/// # Errors
/// When it is something else; the error says what.
pub fn adopt(file: File) -> io::Result<EventFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if link.as_os_str() != LINK {
        let message = format!(
            "a kick, call or err fd must be an eventfd, not {}",
            link.display()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    fcntl(
        &file,
        libc::F_SETFL,
        fcntl(&file, libc::F_GETFL, 0)? | libc::O_NONBLOCK,
    )?;
    fcntl(&file, libc::F_SETFD, libc::FD_CLOEXEC)?;
    // SAFETY: the descriptor is open and ownership moves from `file` to the eventfd.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

fn fcntl(file: &File, command: libc::c_int, value: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open; none of the commands used here has a memory argument.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, value) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eventfd_is_taken_and_never_blocks_again() {
        let blocking = EventFd::new(0).unwrap();
        // SAFETY: ownership moves to the file.
        let file = unsafe { File::from_raw_fd(blocking.into_raw_fd()) };
        let event = adopt(file).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let full = event.write(1).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        let error = adopt(File::open("/dev/zero").unwrap()).unwrap_err();
        assert!(error.to_string().contains("/dev/zero"), "{error}");
    }
}
