//! vringd: a vhost-user back-end that gives virtual machines virtio-net and virtio-blk devices.
//!
//! ```text
//!                      main ─ cli ─ config
//!                             │
//!                           daemon                       wires things, then waits
//!              ┌──────────────┼──────────────┐
//!           control ───────▶ engine          │           cold │ hot
//!         (vhost crates)      │ owns         │
//!                             ▼              ▼
//!                           device ───────▶ host (traits)
//!                             │             ▲
//!              ChainQueue     ▼             │ implements
//!                            ring          uring · tap · xdp
//!                             │             │
//!                             ▼             ▼
//!                           memory ◀────── sys
//!                             │
//!                            sync
//! ```
//!
//! Beside the daemon stands `bench`, the front-end of `vringd bench`, over config, ring, memory and
//! sys.
//!
//! A module uses what lies below it along the arrows and nothing else; `tests/tidy.rs` holds that.
//! Unsafe code lives in `memory` and `sys` alone. docs/architecture.md tells the whole story.

pub mod bench;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod engine;
pub mod helper;
pub mod host;
pub mod logging;
#[expect(unsafe_code, reason = "island 1: maps guest memory and touches it")]
pub mod memory;
pub mod ring;
pub mod sync;
pub mod sys;
#[cfg(any(test, fuzzing, feature = "testing"))]
pub mod testing;
