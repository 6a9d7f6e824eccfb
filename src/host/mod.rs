//! The host side of a device: where frames and blocks go.
//!
//! `host` and not `backend`: in vhost-user the whole daemon is the back-end. The traits here are
//! what the device logic and the engine speak to; the implementations beside them know nothing of
//! virtqueues. All are object-safe: one virtual call per burst, not per frame.
#![forbid(unsafe_code)]

pub mod blk;
mod copies;
pub mod crypt;
pub mod fault;
pub mod limit;
pub mod net;
pub mod null;
pub mod offload;
pub mod qcow2;
pub mod ram;
pub mod sink;
pub mod switch;
pub mod tap;
pub mod uring;
pub mod xdp;
