//! The sum; what is made of frames is tested with the receive queue.

use super::sum::Sum;

/// RFC 1071, section 3, and a byte at a time.
#[test]
fn sums_are_those_of_the_rfc_at_every_length() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(Sum::of(&bytes).checksum(), !0xddf2);
    let data: Vec<u8> = (0..2000u32)
        .map(|at| (at * at / 7).to_le_bytes()[0])
        .collect();
    for len in 0..data.len() {
        let mut slow = 0u32;
        for (at, &byte) in data[..len].iter().enumerate() {
            slow += u32::from(byte) << (8 * (1 - at % 2));
            slow = (slow & 0xffff) + (slow >> 16);
        }
        assert_eq!(u32::from(!Sum::of(&data[..len]).checksum()), slow, "{len}");
        let (even, rest) = data[..len].split_at((len / 2) & !1);
        let mut parts = Sum::of(even);
        parts.add(rest);
        assert_eq!(
            parts.checksum(),
            Sum::of(&data[..len]).checksum(),
            "{len} in two"
        );
    }
    assert_eq!(Sum::of(&vec![0xff; 65536]).checksum(), 0);
}
