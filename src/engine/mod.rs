//! Threads and queues: one worker per configured core, pinned, that owns its queues outright.
//!
//! Control builds a complete endpoint for a vring (areas found and checked, fds in place), sends it
//! to the worker by message, and gets it back when the vring stops, to drop it off the polling
//! core. Nothing below control takes a lock. docs/threading.md has the states, messages and fences.
//!
//! A worker has a table of slots, one for each vring that it may ever serve, and a list of links
//! between slots, taps, interfaces and sinks; both are fixed when the daemon starts. A link works
//! while both its ends are there. `worker` is the loop, `idle` decides when it sleeps, `mailbox`
//! wakes it.
#![forbid(unsafe_code)]

mod backing;
mod batch;
mod build;
mod counted;
mod disk;
mod endpoint;
mod fabric;
mod handle;
mod idle;
mod link;
mod mailbox;
mod moves;
mod net;
mod placement;
mod places;
mod runner;
mod started;
mod telling;
mod topology;
mod uplink;
mod worker;

pub use backing::{Backing, Encryption};
pub use build::{Engine, EngineOptions, LinkSpec, Member, Parts};
pub use handle::DeviceHandle;
pub use idle::IdlePolicy;
pub use runner::{BlockingFd, EngineError, FdKind, VringAddr, VringRunner, VringSetup};
pub use topology::{Placement, Topology};
pub use uplink::{Host, Uplink};
