//! eventfds that a front-end passed: checked for what they are before anything is written to them.
//!
//! A file in the place of a call fd would be written to. A write to an eventfd whose counter is
//! full sleeps, unless O_NONBLOCK is set; that flag belongs to the open file, which the front-end
//! has too, so it is a courtesy and no protection: who writes must be able to be interrupted. See
//! eventfd(2) and proc(5) on /proc/PID/fd.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// What the kernel calls an eventfd.
const LINK: &str = "anon_inode:[eventfd]";

/// Takes `file` over as an eventfd that is not inherited, and does not block as long as its
/// front-end leaves it so.
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

/// What became of a word to the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It is told.
    Told,
    /// It was told so often without looking that the counter is full.
    Full,
    /// The counter is full, and the write slept until a signal came: the eventfd blocks.
    Interrupted,
    /// The kernel refused it.
    Failed,
}

/// Adds 1 to the counter of `event`, once: a signal ends it. The kernel looks for signals only
/// where it would sleep, so that [`Told::Interrupted`] is of an eventfd that blocks and is full.
pub fn tell(event: &EventFd) -> Told {
    let one = 1u64;
    let from = (&raw const one).cast();
    // SAFETY: the descriptor is open, and eight bytes are there to be read.
    let wrote = unsafe { libc::write(event.as_raw_fd(), from, size_of::<u64>()) };
    if wrote >= 0 {
        return Told::Told;
    }
    match io::Error::last_os_error().kind() {
        io::ErrorKind::WouldBlock => Told::Full,
        io::ErrorKind::Interrupted => Told::Interrupted,
        _ => Told::Failed,
    }
}

/// Has writes to `event` sleep when its counter is full, whoever has it: a front-end can do that to
/// an fd that it has passed.
///
/// # Errors
/// What fcntl(2) says.
#[cfg(any(test, feature = "testing"))]
pub fn make_blocking(event: &EventFd) -> io::Result<()> {
    let flags = fcntl(event, libc::F_GETFL, 0)? & !libc::O_NONBLOCK;
    fcntl(event, libc::F_SETFL, flags).map(drop)
}

fn fcntl(file: &impl AsRawFd, command: libc::c_int, value: libc::c_int) -> io::Result<libc::c_int> {
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
    fn an_eventfd_is_taken_and_does_not_block() {
        let blocking = EventFd::new(0).unwrap();
        // SAFETY: ownership moves to the file.
        let file = unsafe { File::from_raw_fd(blocking.into_raw_fd()) };
        let event = adopt(file).unwrap();
        assert_eq!(tell(&event), Told::Told);
        event.write(u64::MAX - 2).unwrap();
        assert_eq!(tell(&event), Told::Full);
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        let error = adopt(File::open("/dev/zero").unwrap()).unwrap_err();
        assert!(error.to_string().contains("/dev/zero"), "{error}");
    }
}
