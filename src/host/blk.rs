//! The asynchronous side of a disk: operations in, completions out.
//!
//! An implementation is lent to the device logic for one turn of the worker's loop. It keeps no
//! reference to the logic; a completion is told by its [`Token`] alone.

use crate::memory::Segment;

/// Names a request of one disk queue: a slot number and the slot's generation, so that a stale
/// completion is a failed check and not a wrong answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Slot of the request.
    pub slot: u16,
    /// How often the slot was used before, modulo 2^16.
    pub generation: u16,
}

/// One operation. Offsets are in bytes.
#[derive(Debug, Clone, Copy)]
pub enum BlkOp<'a> {
    /// Disk to guest memory.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Where to.
        segments: &'a [Segment],
    },
    /// Guest memory to disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Where from.
        segments: &'a [Segment],
        /// Complete only when the data is durable.
        durable: bool,
    },
    /// Everything written so far becomes durable.
    Flush,
    /// What is in the range does not matter any more; a hint.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Length.
        bytes: u32,
    },
    /// The range reads as zeros.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Length.
        bytes: u32,
        /// The space behind it may be given back.
        unmap: bool,
    },
}

/// A finished operation: the bytes done, or the system's error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub token: Token,
    /// Bytes moved, discarded or zeroed (may be fewer than asked for), or errno.
    pub result: Result<u32, i32>,
}

/// The host has no room for another operation now; some complete first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for another operation")]
pub struct Full;

/// A disk as the device logic sees it.
pub trait BlkIo {
    /// Queues an operation. The segments must stay valid until its completion was reaped; the
    /// slice itself need not outlive the call.
    ///
    /// # Errors
    /// [`Full`]: try again after the next `reap` that returned something.
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full>;

    /// The next finished operation, if any.
    fn reap(&mut self) -> Option<Completion>;

    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}
