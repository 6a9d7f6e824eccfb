//! The feature bits of virtio-net as masks, by their names in VIRTIO 1.3 §5.1.3.
//!
//! Only bits that the device offers under some configuration are here.

use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_ORDER_PLATFORM,
    VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The device takes frames with an unfinished checksum.
pub const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
/// The driver takes frames with an unfinished checksum.
pub const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
/// The device tells the largest MTU.
pub const MTU: u64 = 1 << VIRTIO_NET_F_MTU;
/// The device tells a MAC address.
pub const MAC: u64 = 1 << VIRTIO_NET_F_MAC;
/// The driver takes TSO frames over IPv4.
pub const GUEST_TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
/// The driver takes TSO frames over IPv6.
pub const GUEST_TSO6: u64 = 1 << VIRTIO_NET_F_GUEST_TSO6;
/// The driver takes TSO frames with ECN.
pub const GUEST_ECN: u64 = 1 << VIRTIO_NET_F_GUEST_ECN;
/// The device takes TSO frames over IPv4.
pub const HOST_TSO4: u64 = 1 << VIRTIO_NET_F_HOST_TSO4;
/// The device takes TSO frames over IPv6.
pub const HOST_TSO6: u64 = 1 << VIRTIO_NET_F_HOST_TSO6;
/// The device takes TSO frames with ECN.
pub const HOST_ECN: u64 = 1 << VIRTIO_NET_F_HOST_ECN;
/// A received frame may take several buffers.
pub const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// The device tells whether the link is up.
pub const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
/// The device tells speed and duplex of the link.
pub const SPEED_DUPLEX: u64 = 1 << VIRTIO_NET_F_SPEED_DUPLEX;
/// Several queue pairs.
pub const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
/// The driver takes UDP frames to be cut, over IPv4.
pub const GUEST_USO4: u64 = 1 << VIRTIO_NET_F_GUEST_USO4;
/// The driver takes UDP frames to be cut, over IPv6.
pub const GUEST_USO6: u64 = 1 << VIRTIO_NET_F_GUEST_USO6;
/// The device takes UDP frames to be cut.
pub const HOST_USO: u64 = 1 << VIRTIO_NET_F_HOST_USO;

/// The driver follows the specification from 1.0 on.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// What both ring formats offer, and IN_ORDER: the net device uses buffers in the order in which
/// they were made available, in both directions. ANY_LAYOUT, ORDER_PLATFORM and NOTIFICATION_DATA
/// ask nothing of us: we take any framing, our barriers are those of the platform, and what a kick
/// says beyond "look" is not needed by who looks at the ring.
pub const RING: u64 = VERSION_1
    | 1 << VIRTIO_F_ANY_LAYOUT
    | 1 << VIRTIO_F_ORDER_PLATFORM
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_IN_ORDER;

/// Any of these: the driver may send a header that says something.
pub const ANY_HOST_OFFLOAD: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;

/// Any of these: the driver takes frames larger than the MTU.
pub const ANY_GUEST_GSO: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
