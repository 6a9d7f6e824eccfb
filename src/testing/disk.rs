//! A disk in memory that misbehaves on demand: late, reordered, short, failing, full.

use std::collections::VecDeque;

use crate::host::blk::{BlkIo, BlkOp, Completion, Full, Token};
use crate::memory::{Segment, copy};

/// How the next operations end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// As they should.
    Whole,
    /// After at most so many bytes.
    Short(u32),
    /// With this error number, nothing moved.
    Error(i32),
}

/// A disk for tests.
#[derive(Debug)]
pub struct TestDisk {
    /// What is on it.
    pub bytes: Vec<u8>,
    /// How operations end; used up from the front, then [`Ending::Whole`].
    pub endings: VecDeque<Ending>,
    /// Operations that it takes at most before `release`.
    pub room: usize,
    /// Flushes that it saw.
    pub flushes: u32,
    /// Durable writes that it saw.
    pub durable_writes: u32,
    /// Ranges that were discarded, whole: offset and bytes.
    pub discards: Vec<(u64, u32)>,
    /// Ranges that were zeroed with `unmap`.
    pub unmaps: u32,
    held: Vec<(Token, Result<u32, i32>)>,
    ready: VecDeque<Completion>,
}

impl TestDisk {
    /// A disk of `bytes` zero bytes that completes when it is told to.
    pub fn new(bytes: usize) -> TestDisk {
        TestDisk {
            bytes: vec![0; bytes],
            endings: VecDeque::new(),
            room: usize::MAX,
            flushes: 0,
            durable_writes: 0,
            discards: Vec::new(),
            unmaps: 0,
            held: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// Completes everything that was submitted, the last first.
    pub fn release(&mut self) {
        let held = self.held.drain(..).rev();
        self.ready
            .extend(held.map(|(token, result)| Completion { token, result }));
    }

    fn range(&self, offset: u64, segments: &[Segment], limit: u32) -> (usize, usize) {
        let at = usize::try_from(offset).expect("an offset in memory");
        let bytes: usize = segments.iter().map(Segment::len).sum();
        (
            at,
            bytes
                .min(limit as usize)
                .min(self.bytes.len().saturating_sub(at)),
        )
    }
}

impl BlkIo for TestDisk {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        if self.held.len() >= self.room {
            return Err(Full);
        }
        let ending = self.endings.pop_front().unwrap_or(Ending::Whole);
        let limit = match ending {
            Ending::Whole => u32::MAX,
            Ending::Short(bytes) => bytes,
            Ending::Error(errno) => {
                self.held.push((token, Err(errno)));
                return Ok(());
            }
        };
        let moved = match op {
            BlkOp::Read { offset, segments } => {
                let (at, bytes) = self.range(offset, segments, limit);
                copy::write(segments, 0, &self.bytes[at..at + bytes])
            }
            BlkOp::Write {
                offset,
                segments,
                durable,
            } => {
                let (at, bytes) = self.range(offset, segments, limit);
                self.durable_writes += u32::from(durable);
                copy::read(segments, 0, &mut self.bytes[at..at + bytes])
            }
            BlkOp::Flush => {
                self.flushes += 1;
                0
            }
            BlkOp::Discard { offset, bytes } => {
                let bytes = bytes.min(limit);
                self.discards.push((offset, bytes));
                bytes as usize
            }
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => {
                let at = usize::try_from(offset).expect("an offset in memory");
                let bytes = bytes.min(limit) as usize;
                self.unmaps += u32::from(unmap);
                self.bytes[at..at + bytes].fill(0);
                bytes
            }
        };
        self.held
            .push((token, Ok(u32::try_from(moved).expect("a short operation"))));
        Ok(())
    }

    fn reap(&mut self) -> Option<Completion> {
        self.ready.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.ready.len()
    }
}

/// A disk lent for one turn, as the worker's io_uring lends its own.
impl<D: BlkIo> BlkIo for &mut D {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        (**self).submit(token, op)
    }

    fn reap(&mut self) -> Option<Completion> {
        (**self).reap()
    }

    fn in_flight(&self) -> usize {
        (**self).in_flight()
    }
}
