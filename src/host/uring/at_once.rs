//! What needs no device is moved by the worker itself, before anything is submitted.
//!
//! A file system in memory (tmpfs) promises io_uring nothing, so that each operation would be passed
//! to a thread of the kernel and back. There the worker reads and writes by itself. What is in the
//! page cache is read, and where the file system can, written, with RWF_NOWAIT: it is done at once
//! or not at all, and then goes the long way (docs/decisions/0010).

use std::collections::VecDeque;
use std::fs::File;

use crate::host::blk::{BlkOp, Completion, Token};
use crate::memory::Segment;
use crate::sys::disk::Medium;
use crate::sys::rw::{self, Wait};

use super::{EAGAIN, ENOSYS, EOPNOTSUPP};

/// Bytes that a queue copies in a turn at most, so that the worker's other queues are not kept
/// waiting by it. What is more goes the long way.
const BYTES_PER_TURN: usize = 1 << 20;
/// So many reads one after the other that were not in the page cache, and none is tried for a
/// while: an attempt costs a system call.
const MISSES: u32 = 8;
/// How many are not tried then.
const PASSED_OVER: u32 = 64;

/// How one direction is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Through the ring.
    Ring,
    /// At once if the page cache allows it.
    Cached,
    /// At once.
    Memory,
}

/// The operations of a queue that need no device.
#[derive(Debug)]
pub(super) struct AtOnce {
    reads: How,
    writes: How,
    done: VecDeque<Completion>,
    /// Bytes that may still be copied in this turn.
    left: usize,
    misses: u32,
    passed_over: u32,
    moved: u64,
}

impl AtOnce {
    pub(super) fn new(medium: Medium) -> AtOnce {
        let how = match medium {
            Medium::Device => How::Ring,
            Medium::Cache => How::Cached,
            Medium::Memory => How::Memory,
        };
        AtOnce {
            reads: how,
            writes: how,
            done: VecDeque::new(),
            left: BYTES_PER_TURN,
            misses: 0,
            passed_over: 0,
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

    /// Operations so far that were done.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Operations that were done and not reaped yet.
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
        if self.reads == How::Ring && self.writes == How::Ring {
            return false;
        }
        let Some(result) = self.run(file, op) else {
            return false;
        };
        self.moved += 1;
        self.done.push_back(Completion { token, result });
        true
    }

    #[inline]
    fn run(&mut self, file: &File, op: BlkOp<'_>) -> Option<Result<u32, i32>> {
        match op {
            BlkOp::Read { offset, segments } => {
                let wait = self.may(self.reads, segments)?;
                let result = rw::read(file, offset, segments, wait);
                if wait == Wait::Allowed {
                    return Some(result);
                }
                if may_not(result) {
                    self.reads = How::Ring;
                }
                self.count_misses(result);
                result.ok().map(Ok)
            }
            BlkOp::Write {
                offset,
                segments,
                durable,
            } => {
                // The page cache is not where durable writes end.
                if durable && self.writes != How::Memory {
                    return None;
                }
                let wait = self.may(self.writes, segments)?;
                let result = rw::write(file, offset, segments, wait);
                if wait == Wait::Allowed {
                    return Some(result);
                }
                if may_not(result) {
                    self.writes = How::Ring;
                }
                result.ok().map(Ok)
            }
            // Memory is as durable as it gets.
            BlkOp::Flush => (self.writes == How::Memory).then_some(Ok(0)),
            BlkOp::Discard { .. } | BlkOp::WriteZeroes { .. } => None,
        }
    }

    /// How long an operation with these buffers may wait; `None` when it isn't to be tried.
    #[inline]
    fn may(&mut self, how: How, segments: &[Segment]) -> Option<Wait> {
        let wait = match how {
            How::Ring => return None,
            How::Cached => Wait::Never,
            How::Memory => Wait::Allowed,
        };
        if self.passed_over > 0 {
            self.passed_over -= 1;
            return None;
        }
        let bytes = segments.iter().map(Segment::len).sum();
        self.left = self.left.checked_sub(bytes)?;
        Some(wait)
    }

    #[inline]
    fn count_misses(&mut self, result: Result<u32, i32>) {
        if result == Err(EAGAIN) {
            self.misses += 1;
            if self.misses >= MISSES {
                self.passed_over = PASSED_OVER;
            }
        } else {
            self.misses = 0;
        }
    }
}

/// Whether the file system has no such thing as doing without waiting.
#[inline]
fn may_not(result: Result<u32, i32>) -> bool {
    matches!(result, Err(EOPNOTSUPP | ENOSYS))
}

#[cfg(test)]
mod tests;
