//! `RamDisk`: a disk in the daemon's memory, lost when the daemon ends.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::{Segment, Store, copy};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// How much of the first operation's memory is asked for when it is submitted: the rest of a page
/// the CPU sees coming. That of those behind it is asked for line by line during the copy before.
const PREFETCH_BYTES: usize = 1024;

/// What a disk of more bytes is written past the caches: no cache holds it, and each of its lines
/// would be fetched to be overwritten.
const CACHED_MAX: usize = 32 << 20;

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
    /// Bytes moved or zeroed.
    bytes: usize,
}

/// One queue's access to a disk in memory. Operations complete when they are reaped, so that the
/// memory of those behind can be asked for meanwhile.
#[derive(Debug)]
pub struct RamDisk {
    store: Arc<Store>,
    submitted: VecDeque<Submitted>,
    /// Something was written past the caches, and others need not see it yet.
    unsettled: bool,
}

impl RamDisk {
    /// Access to `store` with at most `in_flight` operations between two reaps.
    pub fn new(store: Arc<Store>, in_flight: usize) -> RamDisk {
        RamDisk {
            store,
            submitted: VecDeque::with_capacity(in_flight),
            unsettled: false,
        }
    }

    /// Whether it is written past the caches.
    fn streams(&self) -> bool {
        self.store.bytes() > CACHED_MAX
    }

    /// Lets others see what was written; before the driver is told.
    #[inline]
    pub fn settle(&mut self) {
        if core::mem::take(&mut self.unsettled) {
            copy::settle();
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
                    past_caches: false,
                }),
                len,
            ),
            (&[from], false) => (
                Some(Move {
                    from: from.take(len),
                    to: stored,
                    past_caches: self.streams(),
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
                next if moves.past_caches => {
                    let next = next.map_or(Segment::EMPTY, |next| next.from);
                    self.unsettled = true;
                    copy::one_past_caches(moves.from, moves.to, bytes, next)
                }
                Some(next) => copy::one_before(moves.from, moves.to, bytes, next.from),
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
        if self.past_caches {
            return;
        }
        for at in (0..self.to.len().min(PREFETCH_BYTES)).step_by(64) {
            copy::prefetch_write(&self.to.skip(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, GuestRam, Segments};

    const BLOCK: usize = 4096;
    const BLOCK_BYTES: u32 = 4096;

    fn token(slot: u16) -> Token {
        Token {
            slot,
            generation: 0,
        }
    }

    /// Writes and reads of one burst, in order, whatever the disk is written with: a read sees the
    /// write before it, also before anybody else would.
    #[test]
    fn a_burst_reads_what_it_wrote_on_small_and_large_disks() {
        for bytes in [1 << 20, CACHED_MAX as u64 + (1 << 20)] {
            let store = Arc::new(Store::new(bytes).unwrap());
            let mut disk = RamDisk::new(Arc::clone(&store), 64);
            assert_eq!(disk.streams(), bytes > CACHED_MAX as u64);
            let ram = GuestRam::for_test(&[(0, 0x10_0000)]);
            let segment = |at: u64| {
                let mut out = Segments::with_capacity(1);
                ram.translate(at, BLOCK_BYTES, Access::Write, &mut out)
                    .unwrap();
                out.as_slice()[0]
            };
            let block = |number: u64| -> Vec<u8> {
                (0..BLOCK as u64)
                    .map(|at| (at * 7 + number * 31).to_le_bytes()[0])
                    .collect()
            };
            // Sectors of 512 bytes: the place of a block need not be one of a page.
            let place = |number: u64| 512 + number * 2 * BLOCK as u64;
            for number in 0..16 {
                let (out, back) = (
                    segment(number * 8192 + 1),
                    segment(0x8_0000 + number * 8192),
                );
                copy::write(&[out], 0, &block(number));
                let (offset, durable) = (place(number), false);
                let segments = &[out][..];
                let op = BlkOp::Write {
                    offset,
                    segments,
                    durable,
                };
                disk.submit(token(0), op).unwrap();
                let segments = &[back][..];
                disk.submit(token(1), BlkOp::Read { offset, segments })
                    .unwrap();
            }
            while let Some(done) = disk.reap() {
                assert_eq!(done.result, Ok(BLOCK_BYTES));
            }
            assert_eq!(disk.unsettled, disk.streams());
            disk.settle();
            assert!(!disk.unsettled);
            for number in 0..16 {
                let mut got = vec![0; BLOCK];
                copy::read(&[segment(0x8_0000 + number * 8192)], 0, &mut got);
                assert!(got == block(number), "{number} read, disk of {bytes}");
                copy::read(&[store.segment(place(number), BLOCK)], 0, &mut got);
                assert!(got == block(number), "{number} stored, disk of {bytes}");
            }
        }
    }
}
