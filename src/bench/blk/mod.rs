//! `vringd bench blk`: requests to the back-end of a disk.
//!
//! A thread per queue, or fewer that share them, each polling. `layout` gives out shared memory,
//! `work` says which request comes next, `queue` is one queue under load, `stamp` what a verified
//! block holds and `verify` which ones are in flight, `worker` a thread, `run` a measurement, and
//! `report` what is printed.

mod layout;
mod queue;
mod report;
mod run;
mod stamp;
mod verify;
mod work;
mod worker;

pub use report::Report;
pub use run::run;
pub use stamp::Mismatch;

/// Kinds of requests.
const KINDS: usize = 4;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Trim,
    Flush,
}

impl Kind {
    const ALL: [Kind; KINDS] = [Kind::Read, Kind::Write, Kind::Trim, Kind::Flush];

    fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Trim => "trim",
            Kind::Flush => "flush",
        }
    }
}
