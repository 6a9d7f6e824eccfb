//! `RamDisk`: a disk in the daemon's memory, lost when the daemon ends.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::{Segment, Store, copy};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// How much of the first operation's memory is asked for when it is submitted: the rest of a page
/// the CPU sees coming. That of those behind it is asked for line by line during the copy before.
const PREFETCH_BYTES: usize = 1024;

/// A copy that is to be made: few bytes are in a cache when it is asked for.
#[derive(Debug, Clone, Copy)]
struct Move {
    from: Segment,
    to: Segment,
}

/// An operation that was submitted.
#[derive(Debug, Clone, Copy)]
struct Submitted {
    token: Token,
    /// What is left to do.
    left: Option<Move>,
    /// Bytes moved or zeroed.
    bytes: usize,
}

/// One queue's access to a disk in memory. Operations complete when they are reaped, so that the
/// memory of those behind can be asked for meanwhile.
#[derive(Debug)]
pub struct RamDisk {
    store: Arc<Store>,
    submitted: VecDeque<Submitted>,
}

impl RamDisk {
    /// Access to `store` with at most `in_flight` operations between two reaps.
    pub fn new(store: Arc<Store>, in_flight: usize) -> RamDisk {
        RamDisk {
            store,
            submitted: VecDeque::with_capacity(in_flight),
        }
    }

    /// The copy of a read, or of a write, to or from one segment. Of several it is made at once.
    fn begin(&self, offset: u64, segments: &[Segment], is_read: bool) -> (Option<Move>, usize) {
        let len = segments.iter().map(Segment::len).sum::<usize>();
        let stored = self.store.segment(offset, len);
        let len = stored.len();
        match (segments, is_read) {
            (&[to], true) => (
                Some(Move {
                    from: stored,
                    to: to.take(len),
                }),
                len,
            ),
            (&[from], false) => (
                Some(Move {
                    from: from.take(len),
                    to: stored,
                }),
                len,
            ),
            (to, true) => (None, copy::between(&[stored], 0, to, 0, len)),
            (from, false) => (None, copy::between(from, 0, &[stored], 0, len)),
        }
    }
}

impl BlkIo for RamDisk {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let (left, bytes) = match op {
            BlkOp::Read { offset, segments } => self.begin(offset, segments, true),
            BlkOp::Write {
                offset, segments, ..
            } => self.begin(offset, segments, false),
            BlkOp::Flush => (None, 0),
            BlkOp::Discard { offset, bytes } => {
                (None, self.store.zero(offset, bytes as usize, true))
            }
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => (None, self.store.zero(offset, bytes as usize, unmap)),
        };
        if self.submitted.is_empty() {
            left.inspect(Move::prefetch);
        }
        self.submitted.push_back(Submitted { token, left, bytes });
        Ok(())
    }

    #[inline]
    fn reap(&mut self) -> Option<Completion> {
        let Submitted { token, left, bytes } = self.submitted.pop_front()?;
        if let Some(moves) = left {
            match self.submitted.front().and_then(|next| next.left) {
                Some(next) => copy::one_before(moves.from, moves.to, bytes, (next.from, next.to)),
                None => copy::one(moves.from, moves.to, bytes),
            };
        }
        let result = Ok(u32::try_from(bytes).unwrap_or(u32::MAX));
        Some(Completion { token, result })
    }

    fn in_flight(&self) -> usize {
        self.submitted.len()
    }
}

impl Move {
    #[inline]
    fn prefetch(&self) {
        for at in (0..self.from.len().min(PREFETCH_BYTES)).step_by(64) {
            copy::prefetch_read(&self.from.skip(at));
        }
        for at in (0..self.to.len().min(PREFETCH_BYTES)).step_by(64) {
            copy::prefetch_write(&self.to.skip(at));
        }
    }
}
