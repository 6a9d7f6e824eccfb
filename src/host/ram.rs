//! `RamDisk`: a disk in the daemon's memory, lost when the daemon ends.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::{Segment, Store, copy};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// One queue's access to a disk in memory. Every operation completes at once.
#[derive(Debug)]
pub struct RamDisk {
    store: Arc<Store>,
    done: VecDeque<Completion>,
}

impl RamDisk {
    /// Access to `store` with at most `in_flight` operations between two reaps.
    pub fn new(store: Arc<Store>, in_flight: usize) -> RamDisk {
        RamDisk {
            store,
            done: VecDeque::with_capacity(in_flight),
        }
    }
}

impl BlkIo for RamDisk {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let bytes = |segments: &[Segment]| segments.iter().map(Segment::len).sum::<usize>();
        let moved = match op {
            BlkOp::Read { offset, segments } => {
                let len = bytes(segments);
                copy::between(&[self.store.segment(offset, len)], 0, segments, 0, len)
            }
            BlkOp::Write {
                offset, segments, ..
            } => {
                let len = bytes(segments);
                copy::between(segments, 0, &[self.store.segment(offset, len)], 0, len)
            }
            BlkOp::Flush => 0,
            BlkOp::Discard { offset, bytes } => self.store.zero(offset, bytes as usize, true),
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => self.store.zero(offset, bytes as usize, unmap),
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
