//! A connected front-end socket: looking at a message before it is read.
//!
//! `MSG_PEEK` leaves attached descriptors queued, so a message can be looked at here and read by
//! somebody else. See recv(2), unix(7).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// There is something to read, or the peer is gone.
    Socket,
    /// The other descriptor became readable.
    Exit,
}

/// Waits until `socket` or `exit` is readable.
///
/// # Errors
/// What poll(2) says.
pub fn wait(socket: &UnixStream, exit: &impl AsRawFd) -> io::Result<Ready> {
    let entry = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [entry(socket.as_raw_fd()), entry(exit.as_raw_fd())];
    loop {
        // SAFETY: `fds` has two entries and outlives the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } >= 0 {
            let exit = fds[1].revents != 0;
            return Ok(if exit { Ready::Exit } else { Ready::Socket });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Copies what waits in `socket` to `bytes` without taking it; 0 means that the peer is gone.
///
/// # Errors
/// What recv(2) says.
pub fn peek(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is writable for its length.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            libc::MSG_PEEK,
        )
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Bytes that wait in `socket`.
///
/// # Errors
/// What ioctl(2) says.
pub fn waiting(socket: &UnixStream) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Asks the kernel to report `socket` as readable only once `bytes` bytes wait (or the peer is
/// gone), so that waiting for the rest of a message is no busy loop.
///
/// # Errors
/// What setsockopt(2) says.
pub fn wake_at(socket: &UnixStream, bytes: usize) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: SO_RCVLOWAT reads one int.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            4,
        )
    } < 0;
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Puts the connection of `with` in the place of the descriptor `place`: whoever owns that goes on
/// with the other connection.
///
/// # Errors
/// What dup3(2) says.
pub fn replace(place: &impl AsRawFd, with: &UnixStream) -> io::Result<()> {
    // SAFETY: both descriptors are open; the one replaced keeps its number and its owner.
    let fd = unsafe { libc::dup3(with.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if fd < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Whether the peer has closed its side: nothing more will come.
///
/// # Errors
/// What poll(2) says.
pub fn hung_up(socket: &UnixStream) -> io::Result<bool> {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call.
    if unsafe { libc::poll(&raw mut entry, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(entry.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0)
}
