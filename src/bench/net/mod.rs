//! `vringd bench net`: frames to a network back-end that sends every one back, or takes it.
//!
//! One thread. `layout` gives out shared memory, `pair` is one queue pair under load, `mirror` one
//! that sends frames back, `tcp` the head of frames to be cut, `run` a measurement, and `report`
//! what is printed.

mod layout;
mod mirror;
mod pair;
mod report;
mod run;
mod tcp;

pub use report::Report;
pub use run::run;
