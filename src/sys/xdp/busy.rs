//! Busy polling: the kernel looks for frames when a socket is asked for them, and the interface's
//! interrupts may be put off meanwhile. Linux: Documentation/networking/napi.rst.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys::ifreq::check;

/// For messages.
pub(super) const WHAT: &str = "poll it busily";

/// Frames in one look at most.
const BUDGET: libc::c_int = 64;

/// Has `socket` polled for up to `micros` microseconds; with 0 it is left as it is.
///
/// Polling instead of interrupts takes CAP_NET_ADMIN. Who passed the socket may have done it.
pub(super) fn poll(socket: &OwnedFd, micros: u32) -> io::Result<()> {
    if micros == 0 {
        return Ok(());
    }
    let micros = libc::c_int::try_from(micros).unwrap_or(libc::c_int::MAX);
    if get(socket, libc::SO_PREFER_BUSY_POLL)? == 1 && get(socket, libc::SO_BUSY_POLL)? == micros {
        return Ok(());
    }
    set(socket, libc::SO_PREFER_BUSY_POLL, 1)?;
    set(socket, libc::SO_BUSY_POLL_BUDGET, BUDGET)?;
    set(socket, libc::SO_BUSY_POLL, micros)
}

fn set(socket: &OwnedFd, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let at = (&raw const value).cast();
    // SAFETY: `value` has as many bytes as are told.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, at, 4) })
}

fn get(socket: &OwnedFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut bytes = 4;
    let (at, len) = ((&raw mut value).cast(), &raw mut bytes);
    // SAFETY: `value` has as many bytes as are told.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, at, len) })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testnet::drop_capabilities;
    use crate::sys::xdp::socket;

    #[test]
    fn a_socket_is_polled_for_so_long_and_who_may_not_leaves_it_so() {
        let there = |socket: &OwnedFd| {
            [libc::SO_PREFER_BUSY_POLL, libc::SO_BUSY_POLL].map(|name| get(socket, name).unwrap())
        };
        // Capabilities are a thread's own.
        let test = std::thread::spawn(move || {
            let [polled, not] = [(); 2].map(|()| socket::create().unwrap());
            poll(&not, 0).unwrap();
            assert_eq!(there(&not), [0, 0]);
            poll(&polled, 25).unwrap();
            assert_eq!(there(&polled), [1, 25]);
            drop_capabilities();
            poll(&polled, 25).unwrap();
            let refused = poll(&not, 25).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
            assert_eq!(there(&not), [0, 0]);
        });
        test.join().unwrap();
    }
}
