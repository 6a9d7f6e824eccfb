//! Threads and queues: one worker per configured core, pinned, that owns its queues outright.
//!
//! Control builds a complete endpoint for a vring (areas found and checked, fds in place), sends it
//! to the worker by message, and gets it back when the vring stops, to drop it off the polling core.
//! Nothing below control takes a lock. docs/threading.md has the states, messages and fences.
#![forbid(unsafe_code)]

mod runner;

pub use runner::{EngineError, VringAddr, VringRunner, VringSetup};
