//! The head of a TCP segment whose checksum, and cutting, is left to the back-end.

use super::pair::{FAR, NEAR};

/// Bytes of the head: virtio-net header, Ethernet, IPv4 and TCP.
pub(super) const HEAD_BYTES: usize = 12 + 14 + 20 + 20;

/// Payload of a piece, as with an MTU of 1500 and timestamps.
const PIECE_BYTES: u16 = 1448;
/// Longest frame that needs no cutting: 1500 bytes behind an Ethernet header.
const WHOLE_MAX: u16 = 14 + 1500;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_GSO_TCPV4 (VIRTIO 1.3 §5.1.6).
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// What stands before the payload of a frame of `bytes` bytes.
pub(super) fn head(bytes: u16) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        head[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    let (gso, piece) = if bytes > WHOLE_MAX {
        (GSO_TCPV4, PIECE_BYTES)
    } else {
        (0, 0)
    };
    // Checksum from byte 34 on, at byte 16 of what follows.
    put(&[NEEDS_CSUM, gso, 54, 0]);
    put(&piece.to_le_bytes());
    put(&[34, 0, 16, 0, 0, 0]);
    put(&FAR);
    put(&NEAR);
    put(&[8, 0]);
    let total = bytes - 14;
    let mut ip = [
        0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    put(&ip);
    // Ports, numbers, five words of header, ACK, window.
    put(&[0x30, 0x39, 0x30, 0x39, 0, 0, 0, 1, 0, 0, 0, 1]);
    put(&[0x50, 0x10, 0xff, 0xff]);
    // The sum of the pseudo header, not inverted: what is left to do begins with it.
    let mut pseudo = [0; 12];
    pseudo[..8].copy_from_slice(&ip[12..]);
    pseudo[9] = 6;
    pseudo[10..].copy_from_slice(&(total - 20).to_be_bytes());
    put(&sum(&pseudo).to_be_bytes());
    head
}

/// RFC 1071, not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let [high, low] = [sum >> 16, sum & 0xffff];
    let folded = high + low;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "few words: one carry at most"
    )]
    let folded = (folded + (folded >> 16)) as u16;
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_frame_is_to_be_cut_and_a_short_one_not() {
        let long = head(65535);
        assert_eq!(long[..12], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
        assert_eq!(long[28..30], 65521_u16.to_be_bytes());
        let short = head(1514);
        assert_eq!(short[..12], [1, 0, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
        for frame in [long, short] {
            assert_eq!(sum(&frame[26..46]), 0xffff, "IPv4 header");
        }
    }
}
