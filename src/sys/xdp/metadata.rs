//! TX metadata: what an interface is to do to a frame that is sent, told in front of the frame.
//!
//! Linux 6.11 takes it: Documentation/networking/xsk-tx-metadata.rst. Where the kernel copies, it
//! gives the checksum to the interface like that of any packet of its own; an interface that works
//! in our memory does it only if its driver says that it can, and else ignores what is told
//! without a word.

use std::io;

use crate::sys::netlink::{Netlink, attribute};

/// Bytes before each frame that is sent (`tx_metadata_len`): a cache line, so that frames begin
/// with one.
pub(super) const HEADROOM: u32 = 64;
/// Bytes of them that mean something: `struct xsk_tx_metadata`.
pub(super) const BYTES: u32 = 24;

/// GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID and CTRL_ATTR_FAMILY_NAME.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX and NETDEV_A_DEV_XSK_FEATURES of the family `netdev`.
const GET_DEVICE: u8 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_XSK_FEATURES: u16 = 6;
/// NETDEV_XSK_FLAGS_TX_CHECKSUM.
const TX_CHECKSUM: u64 = 2;
/// Bytes of `genlmsghdr`.
const GENERIC: usize = 4;

/// Who makes the checksums that a guest leaves undone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TxCsum {
    /// The interface, if it works in our memory and says that it can; else we.
    #[default]
    Auto,
    /// The interface, also where the kernel copies; we only where it can't be told.
    Offload,
    /// We.
    Software,
}

/// The checksum of a frame that is left to the interface: over everything from `start` on, and
/// where it is stored from there. What it is over besides stands there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undone {
    /// Bytes from the start of the frame.
    pub start: u16,
    /// Bytes from there.
    pub offset: u16,
}

impl Undone {
    /// As `struct xsk_tx_metadata`: flags, and the request for a checksum.
    #[inline]
    pub(super) fn request(self) -> [u8; BYTES as usize] {
        let mut bytes = [0; BYTES as usize];
        let flags = u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM);
        bytes[..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.start.to_ne_bytes());
        bytes[10..12].copy_from_slice(&self.offset.to_ne_bytes());
        bytes
    }

    /// Whether the checksum stands in the first `len` bytes. The kernel does not take what is
    /// beyond the first buffer, and takes nothing else from the ring then.
    #[inline]
    pub fn is_within(self, len: u32) -> bool {
        u32::from(self.start) + u32::from(self.offset) + 2 <= len
    }
}

/// Whether the driver of interface number `index` says that it makes checksums in frames that it
/// takes from our memory. Kernels that can't be asked (before Linux 6.3) have none that does.
pub(super) fn is_announced(index: u32) -> io::Result<bool> {
    let mut name = generic(GET_FAMILY);
    put(&mut name, FAMILY_NAME, b"netdev\0");
    let netlink = Netlink::new(libc::NETLINK_GENERIC)?;
    let (_, answer) = netlink.ask(CONTROL, &name)?;
    let family = of_answer(&answer, FAMILY_ID).and_then(|id| id.first_chunk().copied());
    let family = family.ok_or_else(|| io::Error::other("a family without a number"))?;
    let mut device = generic(GET_DEVICE);
    put(&mut device, DEVICE_INDEX, &index.to_ne_bytes());
    let family = u16::from_ne_bytes(family);
    let (_, answer) = netlink.ask(family, &device)?;
    Ok(has_checksum(&answer))
}

/// What an answer about an interface says.
fn has_checksum(answer: &[u8]) -> bool {
    let features = of_answer(answer, DEVICE_XSK_FEATURES).and_then(|bits| bits.first_chunk());
    features.is_some_and(|bits| u64::from_ne_bytes(*bits) & TX_CHECKSUM != 0)
}

fn of_answer(answer: &[u8], wanted: u16) -> Option<&[u8]> {
    attribute(answer.get(GENERIC..)?, wanted)
}

/// A `genlmsghdr` of version 1.
fn generic(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

/// Appends an attribute, which has a few bytes.
fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    #[expect(clippy::cast_possible_truncation, reason = "a few bytes")]
    let length = (4 + value.len()) as u16;
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testnet::{drop_capabilities, in_private_netns, ip};
    use crate::sys::xdp::find;

    /// What the kernel says about an interface, as `netdev_nl_dev_fill` puts it.
    fn answer(features: u64) -> Vec<u8> {
        let mut message = generic(GET_DEVICE);
        put(&mut message, DEVICE_INDEX, &7u32.to_ne_bytes());
        put(&mut message, 3, &0x7fu64.to_ne_bytes());
        put(&mut message, 2, &[]);
        put(&mut message, 5, &2u64.to_ne_bytes());
        put(&mut message, DEVICE_XSK_FEATURES, &features.to_ne_bytes());
        put(&mut message, 4, &2u32.to_ne_bytes());
        message
    }

    #[test]
    fn what_a_driver_announces_is_one_bit_of_one_attribute() {
        for (features, has) in [(0, false), (1, false), (2, true), (5, false), (7, true)] {
            assert_eq!(has_checksum(&answer(features)), has, "{features}");
        }
        let whole = answer(2);
        for end in 0..whole.len() - 8 {
            assert!(!has_checksum(&whole[..end]), "{end}");
        }
        assert!(!has_checksum(&[0xff; 64]));
    }

    /// A cable has no memory of ours; the kernel answers anybody.
    #[test]
    fn the_kernel_says_what_the_driver_of_an_interface_announces() {
        in_private_netns(|| {
            ip("link add xa type veth peer name xb");
            drop_capabilities();
            let found = find("xa", 1, None).unwrap();
            assert!(!is_announced(found.index).unwrap());
            let gone = is_announced(12345).unwrap_err();
            assert_eq!(gone.raw_os_error(), Some(libc::ENODEV));
        });
    }

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let undone = Undone {
            start: 34,
            offset: 6,
        };
        let bytes = undone.request();
        assert!(bytes.len() >= size_of::<libc::xsk_tx_metadata>() && BYTES <= HEADROOM);
        assert_eq!(bytes[..8], 2u64.to_ne_bytes());
        assert_eq!(bytes[8..10], 34u16.to_ne_bytes());
        assert_eq!(bytes[10..12], 6u16.to_ne_bytes());
        assert_eq!(bytes[12..], [0; 12]);
        assert!(undone.is_within(42) && !undone.is_within(41));
        let last = Undone {
            start: u16::MAX,
            offset: u16::MAX,
        };
        assert!(!last.is_within(1984));
    }
}
