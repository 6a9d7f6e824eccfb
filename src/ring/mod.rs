//! Virtqueues: the device side of both formats (VIRTIO 1.3 §2.6–§2.8).
//!
//! A virtqueue is shared memory between a guest driver and us. The driver makes descriptor chains
//! available, we pop them, use their buffers, and put them back as used. What is common to the two
//! formats is written once, in [`Virtqueue`]: the walk through a chain (in the main ring, then
//! perhaps in one indirect table), every limit that keeps a hostile driver harmless, translation of
//! each buffer, the count of chains in flight, and the latch that stops a broken ring for good.
//! What differs, layout and index arithmetic, is a dozen small methods in `split` and `packed`.
//!
//! Three habits keep a burst cheap. The driver's index (or flags) is read once for many chains.
//! Used elements are staged and become visible by one release store in `publish`. The question
//! whether the driver wants a call costs one fence and one read per burst.
//!
//! A driver that breaks the rules is answered with a [`RingFault`]: the fault is latched, the ring
//! gives out nothing more, and nothing else is disturbed. Nothing here knows devices, threads, fds
//! or vhost-user.
#![forbid(unsafe_code)]

mod chain;
pub mod event;
mod fault;
mod format;
mod journal;
mod packed;
mod split;
mod virtqueue;

#[cfg(test)]
#[cfg(loom)]
mod loom_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

pub use chain::{Chain, ChainId, ChainQueue, Popped, Single};
pub use fault::RingFault;
pub use format::{Areas, Desc, Head, RingConfig, RingFormat, VringBase};
pub use journal::{Journal, NoJournal};
pub use packed::Packed;
pub use split::Split;
pub use virtqueue::Virtqueue;
