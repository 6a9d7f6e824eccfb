//! `Copies`: operations between a guest and a disk in memory, and their copies.
//!
//! A copy is made when its operation is reaped, so that the memory of the one behind it can be
//! asked for meanwhile.

use std::collections::VecDeque;

use crate::memory::{Segment, copy};

use super::blk::{Completion, Token};

/// How much of the first operation's memory is asked for when it is submitted: the rest of a page
/// the CPU sees coming. That of those behind it is asked for line by line during the copy before.
const PREFETCH_BYTES: usize = 1024;

/// What a disk of more bytes is written past the caches: no cache holds it, and each of its lines
/// would be fetched to be overwritten.
pub(super) const CACHED_MAX: u64 = 32 << 20;

/// A copy that is to be made: few bytes are in a cache when it is asked for.
#[derive(Debug, Clone, Copy)]
struct Move {
    from: Segment,
    to: Segment,
    /// It goes to a disk that no cache holds.
    past_caches: bool,
}

/// An operation that was submitted.
#[derive(Debug, Clone, Copy)]
struct Submitted {
    token: Token,
    /// What is left to do.
    left: Option<Move>,
    /// Whether we move what it moves.
    is_copy: bool,
    /// Bytes moved or zeroed, or why not.
    result: Result<u32, i32>,
}

/// The operations of one queue, in order.
#[derive(Debug, Default)]
pub(super) struct Copies {
    submitted: VecDeque<Submitted>,
    /// Something was written past the caches, and others need not see it yet.
    unsettled: bool,
}

impl Copies {
    /// Room for `in_flight` operations between two reaps.
    pub(super) fn new(in_flight: usize) -> Copies {
        Copies {
            submitted: VecDeque::with_capacity(in_flight),
            unsettled: false,
        }
    }

    /// Room for `in_flight` operations.
    pub(super) fn reserve(&mut self, in_flight: usize) {
        self.submitted.reserve(in_flight);
    }

    /// Whether others need not see yet what was written.
    #[cfg(test)]
    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// Lets others see what was written; before the driver is told.
    #[inline]
    pub(super) fn settle(&mut self) {
        if core::mem::take(&mut self.unsettled) {
            copy::settle();
        }
    }

    /// Operations that were not reaped.
    #[inline]
    pub(super) fn in_flight(&self) -> usize {
        self.submitted.len()
    }

    /// A read of what is `stored` on the disk.
    #[inline]
    pub(super) fn read(&mut self, token: Token, stored: Segment, segments: &[Segment]) {
        let len = stored.len();
        // To several segments it is copied at once.
        let (left, bytes) = match segments {
            &[to] => (
                Some(Move {
                    from: stored,
                    to: to.take(len),
                    past_caches: false,
                }),
                len,
            ),
            to => (None, copy::between(&[stored], 0, to, 0, len)),
        };
        self.copy(token, left, bytes);
    }

    /// A write to what is `stored` on a disk of `disk_bytes` bytes.
    #[inline]
    pub(super) fn write(
        &mut self,
        token: Token,
        stored: Segment,
        segments: &[Segment],
        disk_bytes: u64,
    ) {
        let len = stored.len();
        let (left, bytes) = match segments {
            &[from] => (
                Some(Move {
                    from: from.take(len),
                    to: stored,
                    past_caches: disk_bytes > CACHED_MAX,
                }),
                len,
            ),
            from => (None, copy::between(from, 0, &[stored], 0, len)),
        };
        self.copy(token, left, bytes);
    }

    /// An operation that is done.
    #[inline]
    pub(super) fn done(&mut self, token: Token, result: Result<u32, i32>) {
        self.submitted.push_back(Submitted {
            token,
            left: None,
            is_copy: false,
            result,
        });
    }

    #[inline]
    fn copy(&mut self, token: Token, left: Option<Move>, bytes: usize) {
        if self.submitted.is_empty() {
            left.inspect(Move::prefetch);
        }
        self.submitted.push_back(Submitted {
            token,
            left,
            is_copy: true,
            result: moved(bytes),
        });
    }

    /// Makes the next copy: the operation that is done, and whether it was one that we copied.
    #[inline]
    pub(super) fn reap(&mut self) -> Option<(Completion, bool)> {
        let Submitted {
            token,
            left,
            is_copy,
            result,
        } = self.submitted.pop_front()?;
        if let Some(moves) = left {
            let bytes = moves.to.len();
            match self.submitted.front().and_then(|next| next.left) {
                next if moves.past_caches => {
                    let next = next.map_or(Segment::EMPTY, |next| next.from);
                    self.unsettled = true;
                    copy::one_past_caches(moves.from, moves.to, bytes, next)
                }
                Some(next) => copy::one_before(moves.from, moves.to, bytes, next.from),
                None => copy::one(moves.from, moves.to, bytes),
            };
        }
        Some((Completion { token, result }, is_copy))
    }
}

/// What an operation of so many bytes came to.
pub(super) fn moved(bytes: usize) -> Result<u32, i32> {
    Ok(u32::try_from(bytes).unwrap_or(u32::MAX))
}

impl Move {
    #[inline]
    fn prefetch(&self) {
        for at in (0..self.from.len().min(PREFETCH_BYTES)).step_by(64) {
            copy::prefetch_read(&self.from.skip(at));
        }
        if self.past_caches {
            return;
        }
        for at in (0..self.to.len().min(PREFETCH_BYTES)).step_by(64) {
            copy::prefetch_write(&self.to.skip(at));
        }
    }
}
