//! Feature bits by their names in the specifications, for the one line that a session logs.

use crate::device::DeviceKind;

/// VIRTIO 1.3 §6 and the ring bits.
const TRANSPORT: &[(u32, &str)] = &[
    (24, "VIRTIO_F_NOTIFY_ON_EMPTY"),
    (27, "VIRTIO_F_ANY_LAYOUT"),
    (28, "VIRTIO_F_INDIRECT_DESC"),
    (29, "VIRTIO_F_EVENT_IDX"),
    (32, "VIRTIO_F_VERSION_1"),
    (33, "VIRTIO_F_ACCESS_PLATFORM"),
    (34, "VIRTIO_F_RING_PACKED"),
    (35, "VIRTIO_F_IN_ORDER"),
    (36, "VIRTIO_F_ORDER_PLATFORM"),
    (38, "VIRTIO_F_NOTIFICATION_DATA"),
    (40, "VIRTIO_F_RING_RESET"),
];

/// VIRTIO 1.3 §5.1.3.
const NET: &[(u32, &str)] = &[
    (0, "VIRTIO_NET_F_CSUM"),
    (1, "VIRTIO_NET_F_GUEST_CSUM"),
    (2, "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS"),
    (3, "VIRTIO_NET_F_MTU"),
    (5, "VIRTIO_NET_F_MAC"),
    (7, "VIRTIO_NET_F_GUEST_TSO4"),
    (8, "VIRTIO_NET_F_GUEST_TSO6"),
    (9, "VIRTIO_NET_F_GUEST_ECN"),
    (10, "VIRTIO_NET_F_GUEST_UFO"),
    (11, "VIRTIO_NET_F_HOST_TSO4"),
    (12, "VIRTIO_NET_F_HOST_TSO6"),
    (13, "VIRTIO_NET_F_HOST_ECN"),
    (14, "VIRTIO_NET_F_HOST_UFO"),
    (15, "VIRTIO_NET_F_MRG_RXBUF"),
    (16, "VIRTIO_NET_F_STATUS"),
    (17, "VIRTIO_NET_F_CTRL_VQ"),
    (18, "VIRTIO_NET_F_CTRL_RX"),
    (19, "VIRTIO_NET_F_CTRL_VLAN"),
    (21, "VIRTIO_NET_F_GUEST_ANNOUNCE"),
    (22, "VIRTIO_NET_F_MQ"),
    (23, "VIRTIO_NET_F_CTRL_MAC_ADDR"),
    (54, "VIRTIO_NET_F_GUEST_USO4"),
    (55, "VIRTIO_NET_F_GUEST_USO6"),
    (56, "VIRTIO_NET_F_HOST_USO"),
    (57, "VIRTIO_NET_F_HASH_REPORT"),
    (59, "VIRTIO_NET_F_GUEST_HDRLEN"),
    (60, "VIRTIO_NET_F_RSS"),
    (62, "VIRTIO_NET_F_STANDBY"),
    (63, "VIRTIO_NET_F_SPEED_DUPLEX"),
];

/// VIRTIO 1.3 §5.2.3.
const BLK: &[(u32, &str)] = &[
    (1, "VIRTIO_BLK_F_SIZE_MAX"),
    (2, "VIRTIO_BLK_F_SEG_MAX"),
    (4, "VIRTIO_BLK_F_GEOMETRY"),
    (5, "VIRTIO_BLK_F_RO"),
    (6, "VIRTIO_BLK_F_BLK_SIZE"),
    (9, "VIRTIO_BLK_F_FLUSH"),
    (10, "VIRTIO_BLK_F_TOPOLOGY"),
    (11, "VIRTIO_BLK_F_CONFIG_WCE"),
    (12, "VIRTIO_BLK_F_MQ"),
    (13, "VIRTIO_BLK_F_DISCARD"),
    (14, "VIRTIO_BLK_F_WRITE_ZEROES"),
    (15, "VIRTIO_BLK_F_LIFETIME"),
    (16, "VIRTIO_BLK_F_SECURE_ERASE"),
];

/// vhost-user: "Protocol features".
const PROTOCOL: &[(u32, &str)] = &[
    (0, "MQ"),
    (1, "LOG_SHMFD"),
    (2, "RARP"),
    (3, "REPLY_ACK"),
    (4, "NET_MTU"),
    (5, "BACKEND_REQ"),
    (6, "CROSS_ENDIAN"),
    (8, "PAGEFAULT"),
    (9, "CONFIG"),
    (10, "BACKEND_SEND_FD"),
    (11, "HOST_NOTIFIER"),
    (12, "INFLIGHT_SHMFD"),
    (13, "RESET_DEVICE"),
    (14, "INBAND_NOTIFICATIONS"),
    (15, "CONFIGURE_MEM_SLOTS"),
    (16, "STATUS"),
    (18, "SHARED_OBJECT"),
    (19, "DEVICE_STATE"),
];

/// The virtio feature bits of `features`, by name, without the vhost-user bit 30.
pub(super) fn virtio(kind: DeviceKind, features: u64) -> String {
    let device = match kind {
        DeviceKind::Net => NET,
        DeviceKind::Blk => BLK,
    };
    join(features & !(1 << 30), &[TRANSPORT, device])
}

/// The protocol feature bits of `features`, by name.
pub(super) fn protocol(features: u64) -> String {
    join(features, &[PROTOCOL])
}

fn join(features: u64, tables: &[&[(u32, &str)]]) -> String {
    let name = |bit: u32| {
        let known = tables
            .iter()
            .flat_map(|table| table.iter())
            .find(|(b, _)| *b == bit);
        known.map_or_else(|| format!("bit{bit}"), |(_, name)| (*name).to_owned())
    };
    let bits = (0..64).filter(|bit| features & (1 << bit) != 0);
    let names: Vec<_> = bits.map(name).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// VIRTIO 1.3 §5.2.3, §6.
    #[test]
    fn bits_have_their_names_and_unknown_ones_their_number() {
        let features = (1 << 34) | (1 << 32) | (1 << 30) | (1 << 9) | (1 << 50);
        let blk = virtio(DeviceKind::Blk, features);
        assert_eq!(
            blk,
            "VIRTIO_BLK_F_FLUSH,VIRTIO_F_VERSION_1,VIRTIO_F_RING_PACKED,bit50"
        );
        assert_eq!(protocol(9), "MQ,REPLY_ACK");
        assert_eq!(protocol(0), "none");
    }
}
