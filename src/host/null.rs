//! `NullDisk`: a disk that moves nothing, to measure everything else.
//!
//! Writes are forgotten; reads succeed and leave the guest's buffers as they are.

use std::collections::VecDeque;

use crate::memory::Segment;

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// One queue of a disk that moves nothing.
#[derive(Debug)]
pub struct NullDisk {
    done: VecDeque<Completion>,
}

impl NullDisk {
    /// A queue with at most `in_flight` operations between two reaps.
    pub fn new(in_flight: usize) -> NullDisk {
        NullDisk {
            done: VecDeque::with_capacity(in_flight),
        }
    }
}

impl BlkIo for NullDisk {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let moved = match op {
            BlkOp::Read { segments, .. } | BlkOp::Write { segments, .. } => {
                segments.iter().map(Segment::len).sum::<usize>()
            }
            BlkOp::Flush => 0,
            BlkOp::Discard { bytes, .. } | BlkOp::WriteZeroes { bytes, .. } => bytes as usize,
        };
        let result = Ok(u32::try_from(moved).unwrap_or(u32::MAX));
        self.done.push_back(Completion { token, result });
        Ok(())
    }

    fn reap(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}
