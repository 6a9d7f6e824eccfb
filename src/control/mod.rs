//! vhost-user sessions: cold, may lock and allocate, the only user of the `vhost` crate.
//!
//! Per device there is one thread (`session`), which accepts one front-end at a time. Each message
//! passes the front door (`front_door`), which serves what the crate's parser refuses although real
//! front-ends send it; the parser calls `requests`, which calls `handler`, where a message's effect
//! stands. All facts of a session are in `state`, and can be written down and resumed.
//!
//! A vring starts when size, addresses, kick and memory are known and it is enabled, and never on a
//! kick; GET_VRING_BASE, RESET_DEVICE, status 0 and the end of the connection stop it. SET errors
//! are refused and the session goes on; GET and framing errors close the session.
#![forbid(unsafe_code)]

mod front_door;
mod handler;
mod names;
mod requests;
pub mod session;
mod state;

pub use front_door::SessionEnd;
pub use state::{SessionFds, SessionState, VringFds, VringState, VringStatus};
