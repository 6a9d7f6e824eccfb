//! `vringd bench net`: frames to a network back-end that sends every one back.
//!
//! One thread. `layout` gives out shared memory, `pair` is one queue pair under load, `mirror` one
//! that sends frames back, `run` a measurement, and `report` what is printed.

mod layout;
mod mirror;
mod pair;
mod report;
mod run;

pub use report::Report;
pub use run::run;
