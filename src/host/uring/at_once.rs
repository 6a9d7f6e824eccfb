//! A file in memory is read and written by the worker itself, before anything is submitted.
//!
//! A file system in memory (tmpfs) can't promise io_uring not to wait, so that each operation would
//! be passed to a thread of the kernel and back. Hits in the page cache of other file systems are
//! copied by io_uring itself at once: there nothing is gained (docs/decisions/0010).

use std::collections::VecDeque;
use std::fs::File;

use crate::host::blk::{BlkOp, Completion, Token};
use crate::memory::Segment;
use crate::sys::rw;

/// Bytes that a queue copies in a turn at most, so that the worker's other queues are not kept
/// waiting by it. What is more goes the long way.
const BYTES_PER_TURN: usize = 1 << 20;

/// The operations of a queue that were done at once.
#[derive(Debug)]
pub(super) struct AtOnce {
    /// Whether the file is in memory.
    in_memory: bool,
    done: VecDeque<Completion>,
    /// Bytes that may still be copied in this turn.
    left: usize,
    moved: u64,
}

impl AtOnce {
    pub(super) fn new(in_memory: bool) -> AtOnce {
        AtOnce {
            in_memory,
            done: VecDeque::new(),
            left: BYTES_PER_TURN,
            moved: 0,
        }
    }

    /// Room for `in_flight` completions.
    pub(super) fn attach(&mut self, in_flight: usize) {
        self.done.reserve(in_flight);
    }

    #[inline]
    pub(super) fn begin_turn(&mut self) {
        self.left = BYTES_PER_TURN;
    }

    /// Operations so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Operations that were not reaped yet.
    #[inline]
    pub(super) fn in_flight(&self) -> usize {
        self.done.len()
    }

    #[inline]
    pub(super) fn reap(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    /// Does `op`, or returns `false` where the ring has to.
    #[inline]
    pub(super) fn submit(&mut self, file: &File, token: Token, op: BlkOp<'_>) -> bool {
        if !self.in_memory {
            return false;
        }
        let result = match op {
            BlkOp::Read { offset, segments } if self.may(segments) => {
                rw::read(file, offset, segments)
            }
            // Memory is as durable as it gets.
            BlkOp::Write {
                offset, segments, ..
            } if self.may(segments) => rw::write(file, offset, segments),
            BlkOp::Flush => Ok(0),
            _ => return false,
        };
        self.moved += 1;
        self.done.push_back(Completion { token, result });
        true
    }

    /// Whether so much may still be copied in this turn.
    #[inline]
    fn may(&mut self, segments: &[Segment]) -> bool {
        let bytes = segments.iter().map(Segment::len).sum();
        let left = self.left.checked_sub(bytes);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

#[cfg(test)]
mod tests;
