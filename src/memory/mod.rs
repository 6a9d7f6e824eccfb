//! Guest memory: the only module that maps it and touches it.
//!
//! * [`GuestRam`] is one immutable memory table as the front-end sent it; a new table is a new
//!   `GuestRam`. Unchanged regions share their mapping.
//! * [`Area`] is one part of a virtqueue (descriptor, driver or device area): bounds-checked,
//!   naturally aligned, by-value access with the orderings that the rings need.
//! * [`Segment`] and [`Segments`] are translated buffers; [`copy`] moves bytes through them.
//! * [`Bounce`] is a buffer of ours that is reached through a segment.
//! * [`FileMap`] is a disk's file in memory, [`Store`] a disk in our own.
//! * [`DirtyLog`] marks pages written while the guest migrates.
//!
//! No Rust reference to guest memory is ever formed: the guest may change any byte at any time.
//! Unsafe island 1 of 2; see docs/safety.md.

mod area;
mod bounce;
pub mod copy;
mod dirty;
mod file_map;
#[cfg(fuzzing)]
pub mod meddle;
mod node;
mod prefetch;
mod ram;
mod region;
mod segment;
mod store;
mod stream;
mod torn;
#[cfg(all(test, not(loom)))]
pub(crate) mod watch;

pub use area::Area;
pub use bounce::Bounce;
pub use dirty::DirtyLog;
pub use file_map::FileMap;
pub use ram::{Access, GuestRam, MemoryError, RegionInfo, RegionSpec, Translate};
#[cfg(any(test, fuzzing, feature = "testing"))]
pub use region::memfd;
pub use segment::{SEGMENTS_MAX, Segment, Segments};
pub use store::Store;
