//! Where the headers of a packet are: Ethernet, tags, IPv4 or IPv6, TCP or UDP.

use core::ops::Range;

use crate::host::net::DropReason;

use super::{HEADERS_MAX, get16};

const ETHERNET: usize = 14;
const TAG: usize = 4;
const TAGS_MAX: usize = 2;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
/// VLAN tag and service tag (IEEE 802.1Q).
const TYPE_TAGS: [u16; 2] = [0x8100, 0x88a8];

const IPV6: usize = 40;
/// Extension headers that say nothing of addresses: options hop by hop, and for the destination.
const EXTENSIONS: [u8; 2] = [0, 60];
const EXTENSIONS_MAX: usize = 4;

/// The protocol above IP, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Transport {
    Tcp = 6,
    Udp = 17,
}

/// Where the headers are, in bytes from the start of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) l3: usize,
    pub(super) is_v6: bool,
    pub(super) l4: usize,
    pub(super) transport: Transport,
    /// Where the headers end.
    pub(super) payload: usize,
}

/// Bytes that were looked at, of a frame that may be longer.
struct Head<'a> {
    bytes: &'a [u8],
    frame: usize,
}

impl Head<'_> {
    /// Headers up to `end` are there.
    fn reaches(&self, end: usize) -> Result<(), DropReason> {
        if end > self.frame {
            Err(DropReason::BadVnetHeader)
        } else if end > self.bytes.len() {
            Err(DropReason::NoOffload)
        } else {
            Ok(())
        }
    }

    fn byte(&self, at: usize) -> Result<u8, DropReason> {
        self.reaches(at + 1).map(|()| self.bytes[at])
    }

    fn word(&self, at: usize) -> Result<u16, DropReason> {
        self.reaches(at + 2).map(|()| get16(self.bytes, at))
    }
}

impl Layout {
    /// The headers in `bytes`, with which a frame of `frame` bytes begins.
    ///
    /// # Errors
    /// [`DropReason::BadVnetHeader`] when the frame ends before its headers do,
    /// [`DropReason::NoOffload`] when they are none that we know.
    pub(super) fn parse(bytes: &[u8], frame: usize) -> Result<Layout, DropReason> {
        debug_assert!(bytes.len() <= HEADERS_MAX);
        let head = Head { bytes, frame };
        let mut l3 = ETHERNET;
        let mut kind = head.word(l3 - 2)?;
        for _ in 0..TAGS_MAX {
            if TYPE_TAGS.contains(&kind) {
                l3 += TAG;
                kind = head.word(l3 - 2)?;
            }
        }
        let (is_v6, (protocol, l4)) = match kind {
            TYPE_IPV4 => (false, ipv4(&head, l3)?),
            TYPE_IPV6 => (true, ipv6(&head, l3)?),
            _ => return Err(DropReason::NoOffload),
        };
        let (transport, length) = match protocol {
            6 => (Transport::Tcp, usize::from(head.byte(l4 + 12)? >> 4) * 4),
            17 => (Transport::Udp, 8),
            _ => return Err(DropReason::NoOffload),
        };
        if transport == Transport::Tcp && length < 20 {
            return Err(DropReason::BadVnetHeader);
        }
        let payload = l4 + length;
        head.reaches(payload)?;
        Ok(Layout {
            l3,
            is_v6,
            l4,
            transport,
            payload,
        })
    }

    /// Where the checksum of the transport is.
    pub(super) fn checksum(&self) -> usize {
        self.l4
            + match self.transport {
                Transport::Tcp => 16,
                Transport::Udp => 6,
            }
    }

    /// Without extension headers, which not every interface steps over.
    pub(super) fn is_usual(&self) -> bool {
        !self.is_v6 || self.l4 == self.l3 + IPV6
    }

    /// The two addresses of the pseudo-header.
    pub(super) fn addresses(&self) -> Range<usize> {
        if self.is_v6 {
            self.l3 + 8..self.l3 + IPV6
        } else {
            self.l3 + 12..self.l3 + 20
        }
    }
}

/// Protocol, and where its header begins.
fn ipv4(head: &Head<'_>, at: usize) -> Result<(u8, usize), DropReason> {
    let first = head.byte(at)?;
    let length = usize::from(first & 15) * 4;
    if first >> 4 != 4 || length < 20 {
        return Err(DropReason::BadVnetHeader);
    }
    head.reaches(at + length)?;
    // A fragment can't be cut again: more to come, or not the first.
    if head.word(at + 6)? & 0x3fff != 0 {
        return Err(DropReason::NoOffload);
    }
    Ok((head.byte(at + 9)?, at + length))
}

/// The same; extension headers are stepped over where they change nothing.
fn ipv6(head: &Head<'_>, at: usize) -> Result<(u8, usize), DropReason> {
    if head.byte(at)? >> 4 != 6 {
        return Err(DropReason::BadVnetHeader);
    }
    head.reaches(at + IPV6)?;
    let (mut protocol, mut end) = (head.byte(at + 6)?, at + IPV6);
    for _ in 0..EXTENSIONS_MAX {
        if EXTENSIONS.contains(&protocol) {
            protocol = head.byte(end)?;
            end += (usize::from(head.byte(end + 1)?) + 1) * 8;
        }
    }
    Ok((protocol, end))
}
