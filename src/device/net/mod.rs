//! virtio-net: what a guest sees of a network card. VIRTIO 1.3 §5.1.
//!
//! * [`NetModel`] is the cold part: features, config space, counters by name.
//! * [`TxHandler`] turns chains that the guest sends into frames, by reference.
//! * [`RxHandler`] copies frames of a burst into the guest's buffers.
//! * [`RxWindow`] lends the guest's buffers to a host interface that reads into them.
//!
//! The header has 12 bytes, or 10 for a legacy driver without mergeable buffers. Where frames go is
//! the link's business.

mod config;
mod counters;
pub mod feature;
pub mod header;
mod rx;
#[cfg(test)]
mod tests;
mod tx;
mod window;

pub use config::{Duplex, LinkInfo, NetModel, NetOptions, Offloads, QUEUE_PAIRS_MAX};
pub use counters::{Direction, NetCounters, QueueCounters, SIZES, Tally};
pub use rx::RxHandler;
pub use tx::TxHandler;
pub use window::{Refill, RxWindow, need_bytes};

/// Bytes of the largest frame, without the virtio-net header: an IP packet of 65,535 bytes and its
/// Ethernet header, rounded as in VIRTIO 1.3 §5.1.6.3.1.
pub const FRAME_BYTES_MAX: u32 = 65550;
