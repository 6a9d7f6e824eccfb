//! What tests, models, fuzz targets and benches share: the driver side of a virtqueue, scripted
//! queues, and disks that misbehave on demand.
//!
//! Compiled only for tests, fuzzing and with the feature `testing`; no part of the daemon.

pub mod disk;
pub mod driver;
pub mod fuzz;
pub mod packets;
pub mod probe;
pub mod session;
