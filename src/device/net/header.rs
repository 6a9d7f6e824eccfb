//! The virtio-net header: the check of a sender's, and what a receiver can take.
//!
//! A header is read once into a local and rebuilt, never passed on as it came: what reaches another
//! guest or the kernel holds nothing that was not checked against the frame and against the
//! features that the sender acknowledged. VIRTIO 1.3 §5.1.6.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::host::net::{DropReason, VnetHeader};

use super::feature;

/// A constant of the bindings, which are all of 32 bits, in the width of its field.
const fn low(value: u32) -> u8 {
    assert!(value < 0x100);
    value.to_le_bytes()[0]
}

/// The checksum is not complete: the receiver finishes it.
pub const NEEDS_CSUM: u8 = low(VIRTIO_NET_HDR_F_NEEDS_CSUM);
/// The checksum was validated by whoever received the frame first.
pub const DATA_VALID: u8 = low(VIRTIO_NET_HDR_F_DATA_VALID);
/// Not a GSO frame.
pub const GSO_NONE: u8 = low(VIRTIO_NET_HDR_GSO_NONE);
/// TCP over IPv4, to be segmented.
pub const GSO_TCPV4: u8 = low(VIRTIO_NET_HDR_GSO_TCPV4);
/// TCP over IPv6, to be segmented.
pub const GSO_TCPV6: u8 = low(VIRTIO_NET_HDR_GSO_TCPV6);
/// UDP to be cut into datagrams.
pub const GSO_UDP_L4: u8 = low(VIRTIO_NET_HDR_GSO_UDP_L4);
/// Set beside a TCP type: the segments carry ECN.
pub const GSO_ECN: u8 = low(VIRTIO_NET_HDR_GSO_ECN);

/// Builds the header of a frame of `frame_bytes` bytes from the one that its sender wrote, who
/// acknowledged `features`.
///
/// # Errors
/// [`DropReason::BadVnetHeader`] when `raw` contradicts itself, the frame or the features.
#[inline]
pub fn check(raw: &VnetHeader, frame_bytes: u32, features: u64) -> Result<VnetHeader, DropReason> {
    let needs_csum = raw.flags & NEEDS_CSUM != 0 && features & feature::CSUM != 0;
    if !needs_csum && raw.gso_type == GSO_NONE {
        return Ok(VnetHeader::default());
    }
    check_offloads(raw, needs_csum, frame_bytes, features).ok_or(DropReason::BadVnetHeader)
}

/// `None` when the header is bad.
fn check_offloads(
    raw: &VnetHeader,
    needs_csum: bool,
    frame_bytes: u32,
    features: u64,
) -> Option<VnetHeader> {
    // Segmentation writes new checksums, so it can't do without the place of the checksum.
    if !needs_csum {
        return None;
    }
    let csum_end = u32::from(raw.csum_start) + u32::from(raw.csum_offset) + 2;
    if csum_end > frame_bytes {
        return None;
    }
    let plain = VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: raw.csum_start,
        csum_offset: raw.csum_offset,
        ..VnetHeader::default()
    };
    if raw.gso_type == GSO_NONE {
        return Some(plain);
    }
    let wanted = match raw.gso_type & !GSO_ECN {
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        GSO_UDP_L4 if raw.gso_type & GSO_ECN == 0 => feature::HOST_USO,
        _ => return None,
    } | if raw.gso_type & GSO_ECN != 0 {
        feature::HOST_ECN
    } else {
        0
    };
    let known = features & wanted == wanted;
    if !known || raw.gso_size == 0 || u32::from(raw.hdr_len) > frame_bytes {
        return None;
    }
    Some(VnetHeader {
        gso_type: raw.gso_type,
        hdr_len: raw.hdr_len,
        gso_size: raw.gso_size,
        ..plain
    })
}

/// Whether a receiver that acknowledged `features` can take a frame with `header`.
#[inline]
pub fn deliverable(header: &VnetHeader, features: u64) -> bool {
    if header.flags & NEEDS_CSUM == 0 && header.gso_type == GSO_NONE {
        return true;
    }
    let gso = match header.gso_type & !GSO_ECN {
        GSO_NONE => 0,
        GSO_TCPV4 => feature::GUEST_TSO4,
        GSO_TCPV6 => feature::GUEST_TSO6,
        // The type does not tell IPv4 from IPv6, so the receiver must have asked for both.
        GSO_UDP_L4 => feature::GUEST_USO4 | feature::GUEST_USO6,
        _ => return false,
    };
    let ecn = if header.gso_type & GSO_ECN != 0 {
        feature::GUEST_ECN
    } else {
        0
    };
    let wanted = feature::GUEST_CSUM | gso | ecn;
    features & wanted == wanted
}

#[cfg(test)]
mod tests {
    use super::super::feature::*;
    use super::*;

    const ALL: u64 = CSUM
        | GUEST_CSUM
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | HOST_USO
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | GUEST_USO4
        | GUEST_USO6;

    fn gso(gso_type: u8) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    /// VIRTIO 1.3 §5.1.6.2.1: `num_buffers` is not the sender's.
    #[test]
    fn a_good_header_survives_and_loses_what_is_not_the_senders_to_say() {
        let keep = |raw: VnetHeader, want: VnetHeader| {
            assert_eq!(check(&raw, 3000, ALL), Ok(want), "{raw:?}");
        };
        keep(VnetHeader::default(), VnetHeader::default());
        for gso_type in [
            GSO_TCPV4,
            GSO_TCPV6,
            GSO_TCPV4 | GSO_ECN,
            GSO_TCPV6 | GSO_ECN,
            GSO_UDP_L4,
        ] {
            keep(gso(gso_type), gso(gso_type));
            let noisy = VnetHeader {
                flags: 0xff,
                num_buffers: 77,
                ..gso(gso_type)
            };
            keep(noisy, gso(gso_type));
        }
        let csum = VnetHeader {
            hdr_len: 0,
            gso_size: 0,
            ..gso(GSO_NONE)
        };
        keep(gso(GSO_NONE), csum);
        // DATA_VALID is for receivers; without NEEDS_CSUM the offsets mean nothing.
        let data_valid = VnetHeader {
            flags: DATA_VALID,
            ..gso(GSO_NONE)
        };
        keep(data_valid, VnetHeader::default());
    }

    /// VIRTIO 1.3 §5.1.6.2.
    #[test]
    fn a_header_that_contradicts_itself_or_the_frame_is_bad() {
        let v4 = gso(GSO_TCPV4);
        let cases = [
            ("GSO without NEEDS_CSUM", VnetHeader { flags: 0, ..v4 }),
            ("unknown GSO type", gso(7)),
            ("UFO was never offered", gso(3)),
            ("ECN without TCP", gso(GSO_ECN)),
            ("ECN with UDP", gso(GSO_UDP_L4 | GSO_ECN)),
            ("no segment size", VnetHeader { gso_size: 0, ..v4 }),
            (
                "headers longer than the frame",
                VnetHeader {
                    hdr_len: 3001,
                    ..v4
                },
            ),
            (
                "checksum past the end",
                VnetHeader {
                    csum_start: 2983,
                    ..v4
                },
            ),
            (
                "sum beyond 16 bits",
                VnetHeader {
                    csum_start: u16::MAX,
                    csum_offset: u16::MAX,
                    ..v4
                },
            ),
        ];
        for (what, raw) in cases {
            assert_eq!(
                check(&raw, 3000, ALL),
                Err(DropReason::BadVnetHeader),
                "{what}"
            );
        }
        let last = VnetHeader {
            csum_start: 2982,
            hdr_len: 3000,
            ..v4
        };
        assert_eq!(check(&last, 3000, ALL), Ok(last));
    }

    #[test]
    fn what_the_sender_did_not_acknowledge_is_not_accepted() {
        let cases = [
            (gso(GSO_TCPV4), HOST_TSO4),
            (gso(GSO_TCPV6), HOST_TSO6),
            (gso(GSO_TCPV4 | GSO_ECN), HOST_ECN),
            (gso(GSO_UDP_L4), HOST_USO),
            (gso(GSO_TCPV4), CSUM),
        ];
        for (raw, bit) in cases {
            let answer = check(&raw, 3000, ALL & !bit);
            assert_eq!(
                answer,
                Err(DropReason::BadVnetHeader),
                "{raw:?} without {bit:#x}"
            );
        }
        // A checksum request that was not negotiated is dropped from the header, not the frame.
        let answer = check(&gso(GSO_NONE), 3000, ALL & !CSUM);
        assert_eq!(answer, Ok(VnetHeader::default()));
    }

    #[test]
    fn a_receiver_gets_only_the_offloads_that_it_acknowledged() {
        let csum = VnetHeader {
            flags: NEEDS_CSUM,
            ..VnetHeader::default()
        };
        let cases = [
            (VnetHeader::default(), 0),
            (csum, GUEST_CSUM),
            (gso(GSO_TCPV4), GUEST_CSUM | GUEST_TSO4),
            (gso(GSO_TCPV6), GUEST_CSUM | GUEST_TSO6),
            (
                gso(GSO_TCPV6 | GSO_ECN),
                GUEST_CSUM | GUEST_TSO6 | GUEST_ECN,
            ),
            (gso(GSO_UDP_L4), GUEST_CSUM | GUEST_USO4 | GUEST_USO6),
        ];
        for (header, wanted) in cases {
            assert!(deliverable(&header, wanted), "{header:?}");
            for bit in (0..64).map(|i| 1 << i).filter(|bit| wanted & bit != 0) {
                assert!(
                    !deliverable(&header, ALL & !bit),
                    "{header:?} without {bit:#x}"
                );
            }
        }
        assert!(!deliverable(&gso(3), u64::MAX));
    }
}
