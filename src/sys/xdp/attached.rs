//! Whether an interface has an XDP program, and where: rtnetlink(7) tells anybody.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::sys::ifreq::check;

use super::Mode;

/// Bytes of `nlmsghdr`, of `ifinfomsg`, and of `rtattr`.
const HEADER: usize = 16;
const INTERFACE: usize = 16;
const ATTRIBUTE: usize = 4;
/// More than the kernel says about an interface.
const BUFFER: usize = 32768;
/// IFLA_XDP, and in it IFLA_XDP_ATTACHED.
const XDP: u16 = 43;
const ATTACHED: u16 = 2;
/// The type of an attribute, without NLA_F_NESTED.
const TYPE_MASK: u16 = 0x3fff;

/// Where the program of interface number `index` runs; `None` when it has none.
pub(super) fn mode(index: u32) -> io::Result<Option<Mode>> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    check(fd)?;
    // SAFETY: `fd` is open and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = Vec::with_capacity(HEADER + INTERFACE);
    #[expect(clippy::cast_possible_truncation, reason = "32")]
    request.extend(((HEADER + INTERFACE) as u32).to_ne_bytes());
    request.extend(libc::RTM_GETLINK.to_ne_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "1")]
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // Sequence number, port; family and type.
    request.extend([0; 12]);
    request.extend(index.to_ne_bytes());
    request.extend([0; 8]);
    // SAFETY: `request` has that many bytes. Without an address they go to the kernel.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = vec![0; BUFFER];
    // SAFETY: `answer` is writable for its length. The kernel has answered before `send` returned.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            answer.as_mut_ptr().cast(),
            answer.len(),
            libc::MSG_DONTWAIT,
        )
    };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let answer = &answer[..got];
    if answer.len() < HEADER + INTERFACE
        || u16::from_ne_bytes([answer[4], answer[5]]) != libc::RTM_NEWLINK
    {
        return Err(io::Error::other("an answer about something else"));
    }
    Ok(read(&answer[HEADER + INTERFACE..]))
}

/// What the attributes of an interface say.
fn read(attributes: &[u8]) -> Option<Mode> {
    // XDP_ATTACHED_DRV, _SKB, _HW, and _MULTI: of several the driver's is the first.
    match attribute(attribute(attributes, XDP)?, ATTACHED)?.first()? {
        1 | 3 | 4 => Some(Mode::Native),
        2 => Some(Mode::Generic),
        _ => None,
    }
}

/// The value of the first attribute of this type.
fn attribute(mut all: &[u8], wanted: u16) -> Option<&[u8]> {
    while all.len() >= ATTRIBUTE {
        let length = usize::from(u16::from_ne_bytes([all[0], all[1]]));
        let kind = u16::from_ne_bytes([all[2], all[3]]) & TYPE_MASK;
        if kind == wanted {
            return all.get(ATTRIBUTE..length);
        }
        // The next one begins at a multiple of four bytes.
        let next = length.next_multiple_of(4).max(ATTRIBUTE);
        all = all.get(next..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_any_bytes_are_read_to_their_end() {
        let nested = |attached: u8| {
            let mut bytes = vec![5, 0, 1, 0, 9, 0, 0, 0];
            bytes.extend([12, 0, 43, 0x80, 5, 0, 2, 0, attached, 0, 0, 0]);
            bytes
        };
        assert_eq!(read(&nested(0)), None);
        assert_eq!(read(&nested(1)), Some(Mode::Native));
        assert_eq!(read(&nested(2)), Some(Mode::Generic));
        let whole = nested(1);
        for end in 0..17 {
            assert_eq!(read(&whole[..end]), None, "{end}");
        }
        for length in [0, 1, 3, 255] {
            let mut bytes = whole.clone();
            bytes[0] = length;
            bytes[8] = length;
            assert_eq!(read(&bytes), None, "{length}");
        }
        assert_eq!(read(&[0xff; 64]), None);
    }
}
