//! Questions to the kernel over netlink(7), and the attributes of its answers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::ifreq::check;

/// Bytes of `nlmsghdr`, and of `nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
/// More than the kernel says about an interface.
const BUFFER: usize = 32768;
/// The type of an attribute, without NLA_F_NESTED.
const TYPE_MASK: u16 = 0x3fff;
/// Bytes of `ifinfomsg`.
const INTERFACE: usize = 16;

/// A socket that questions are asked over, of the network namespace in which it was made.
#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    /// To ask the part of the kernel that speaks `protocol`.
    pub(super) fn new(protocol: libc::c_int) -> io::Result<Netlink> {
        let family = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, family, protocol) };
        check(fd)?;
        // SAFETY: `fd` is open and nobody else has it.
        Ok(Netlink(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The attributes of interface number `index`.
    pub(super) fn interface(&self, index: u32) -> io::Result<Vec<u8>> {
        // Family and type come first, flags last.
        let mut body = [0; INTERFACE];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let (kind, answer) = self.ask(libc::RTM_GETLINK, &body)?;
        match answer.get(INTERFACE..) {
            Some(attributes) if kind == libc::RTM_NEWLINK => Ok(attributes.to_vec()),
            _ => Err(io::Error::other("an answer about something else")),
        }
    }

    /// Asks by a message of type `kind`, and what follows its header. Answers the type of the first
    /// message that comes back and what follows its header.
    pub(super) fn ask(&self, kind: u16, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "1")]
        request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
        // Sequence number and port.
        request.extend([0; 8]);
        request.extend(body);
        let fd = self.0.as_raw_fd();
        // SAFETY: `request` has that many bytes. Without an address they go to the kernel.
        let sent = unsafe { libc::send(fd, request.as_ptr().cast(), request.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer = vec![0; BUFFER];
        let (at, room) = (answer.as_mut_ptr().cast(), answer.len());
        // SAFETY: `answer` is writable for its length. The kernel has answered before `send` has
        // returned.
        let got = unsafe { libc::recv(fd, at, room, libc::MSG_DONTWAIT) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        answer.truncate(got);
        read(&answer)
    }
}

/// The first message of an answer. A refusal is an error.
fn read(answer: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let strange = || io::Error::other("an answer about something else");
    let body = answer.get(HEADER..).ok_or_else(strange)?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    if i32::from(kind) == libc::NLMSG_ERROR {
        let code = body.first_chunk().copied().ok_or_else(strange)?;
        let code = i32::from_ne_bytes(code).wrapping_neg();
        return Err(io::Error::from_raw_os_error(code));
    }
    Ok((kind, body.to_vec()))
}

/// The value of the first attribute of this type.
pub(super) fn attribute(mut all: &[u8], wanted: u16) -> Option<&[u8]> {
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
    fn a_refusal_is_an_error_and_a_short_answer_is_none() {
        let mut answer = vec![36, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        answer.extend((-libc::ENODEV).to_ne_bytes());
        let refused = read(&answer).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENODEV));
        for end in 0..20 {
            assert_eq!(
                read(&answer[..end]).unwrap_err().raw_os_error(),
                None,
                "{end}"
            );
        }
        answer[4] = 16;
        assert_eq!(read(&answer).unwrap(), (16, answer[16..].to_vec()));
    }
}
