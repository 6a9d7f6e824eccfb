//! `Crypt`: encryption at rest, a layer over any other disk.
//!
//! Data crosses from the guest's memory into pieces of our own memory, and back, and is encrypted
//! or decrypted on that way, sector by sector, by the worker that serves the queue. Pieces never
//! hold anything but ciphertext, and guest memory never does: the disk sees the one, the guest the
//! other. A guest that changes its buffers meanwhile spoils what it writes and nothing else. The
//! pieces also suit direct I/O whatever the guest's buffers are.
//!
//! An operation takes as many pieces as it needs, up to [`PIECES_PER_OP`]; a longer one, or one
//! that finds fewer, is done in parts, as if the disk had done short I/O. What the disk does short
//! is reported in whole sectors; less than one is carried on here.
//!
//! Discards go through: what such a range reads as afterwards is what the cipher makes of the
//! disk's zeros. Zeros are written, as ciphertext.

use std::io;

use crate::memory::{Segment, Store, copy};
use crate::sys::key::DiskKey;
use crate::sys::xts::{Direction, Xts};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// Bytes of a piece: a multiple of every sector size and of all that direct I/O asks for.
pub const PIECE_BYTES: usize = 32 << 10;
/// Pieces of one operation at most.
pub const PIECES_PER_OP: usize = 32;

/// Segments of a read that are kept without allocating: a request of the usual kind, cut once.
const SEGMENTS_USUAL: usize = 132;

/// What the device logic does again later.
const EAGAIN: i32 = 11;

/// An operation in flight that has pieces.
#[derive(Debug)]
struct Slot {
    /// The first `count` are its pieces.
    pieces: [u16; PIECES_PER_OP],
    /// The same as memory, no more than `bytes` together. Beyond `count` it is never read, so that
    /// a small operation touches a small part of it.
    list: [Segment; PIECES_PER_OP],
    count: usize,
    /// First byte on the disk.
    offset: u64,
    bytes: usize,
    /// What the disk did of it before, which was less than a sector.
    done: usize,
    /// What kind of write; a read otherwise.
    write: Option<Durable>,
    /// Where a read goes.
    target: Vec<Segment>,
}

impl Slot {
    /// Its pieces without their first `skip` bytes, and how many that are.
    #[cold]
    fn rest(&self, mut skip: usize) -> ([Segment; PIECES_PER_OP], usize) {
        let mut rest = [Segment::EMPTY; PIECES_PER_OP];
        let mut count = 0;
        for piece in &self.list[..self.count] {
            let here = piece.skip(skip);
            skip -= piece.len() - here.len();
            if !here.is_empty() {
                rest[count] = here;
                count += 1;
            }
        }
        (rest, count)
    }
}

/// Whether a write must be durable.
#[derive(Debug, Clone, Copy)]
struct Durable(bool);

/// What a queue needs to encrypt.
#[derive(Debug)]
pub struct Crypt {
    cipher: Cipher,
    /// A mapping of its own, so aligned to a page; pages that are never used are never taken.
    pieces: Store,
    /// Those not in use, the last used last: it is in the cache.
    free: Vec<u16>,
    /// Never written.
    zeroes: Store,
    slots: Box<[Slot]>,
}

/// The key, and what it takes to use it on any segments.
#[derive(Debug)]
struct Cipher {
    xts: Xts,
    /// A sector whose bytes lie in several segments.
    scratch: Store,
}

impl Crypt {
    /// With `key`, in sectors of `sector` bytes, for tokens whose slots are below `in_flight`.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(key: &DiskKey, sector: u32, in_flight: u16) -> io::Result<Crypt> {
        let slot = |_| Slot {
            pieces: [0; PIECES_PER_OP],
            list: [Segment::EMPTY; PIECES_PER_OP],
            count: 0,
            offset: 0,
            bytes: 0,
            done: 0,
            write: None,
            target: Vec::with_capacity(SEGMENTS_USUAL),
        };
        Ok(Crypt {
            cipher: Cipher {
                xts: Xts::new(key, sector)?,
                scratch: Store::new(sector.into())?,
            },
            pieces: Store::new(u64::from(in_flight) * PIECE_BYTES as u64)?,
            free: (0..in_flight).rev().collect(),
            zeroes: Store::new(PIECE_BYTES as u64)?,
            slots: (0..in_flight).map(slot).collect(),
        })
    }

    /// `disk`, encrypted, for one turn.
    pub fn over<D: BlkIo>(&mut self, disk: D) -> Crypted<'_, D> {
        Crypted { crypt: self, disk }
    }

    /// Takes pieces for an operation on `bytes` bytes, or for as much of it as there are pieces.
    fn take(&mut self, token: Token, offset: u64, bytes: usize) -> Result<(), Full> {
        // The device logic asks for whole sectors only; if it did not, the rest would be short.
        let bytes = self.cipher.xts.whole(bytes);
        let slot = &mut self.slots[usize::from(token.slot)];
        let count = bytes.div_ceil(PIECE_BYTES).min(PIECES_PER_OP);
        let count = count.min(self.free.len());
        if count == 0 && bytes > 0 {
            return Err(Full);
        }
        slot.count = count;
        slot.offset = offset;
        slot.bytes = bytes.min(count * PIECE_BYTES);
        slot.done = 0;
        slot.write = None;
        let mut left = slot.bytes;
        let places = slot.pieces.iter_mut().zip(&mut slot.list);
        for ((piece, memory), free) in places.zip(self.free.drain(self.free.len() - count..)) {
            let here = left.min(PIECE_BYTES);
            left -= here;
            *piece = free;
            *memory = self
                .pieces
                .segment(u64::from(free) * PIECE_BYTES as u64, here);
        }
        Ok(())
    }

    fn give_back(&mut self, token: Token) {
        let slot = &mut self.slots[usize::from(token.slot)];
        self.free.extend(slot.pieces[..slot.count].iter().rev());
        slot.count = 0;
    }

    /// Whole sectors of an operation, the first of them its own first.
    fn encrypt(&mut self, token: Token, from: &[Segment]) {
        let slot = &self.slots[usize::from(token.slot)];
        let to = &slot.list[..slot.count];
        self.cipher
            .run(Direction::Encrypt, slot.offset, from, to, slot.bytes);
    }

    fn decrypt(&mut self, token: Token, bytes: usize) {
        let slot = &self.slots[usize::from(token.slot)];
        let from = &slot.list[..slot.count];
        self.cipher
            .run(Direction::Decrypt, slot.offset, from, &slot.target, bytes);
    }
}

impl Cipher {
    /// Sectors in whole segments go straight from one side to the other, those that a segment ends
    /// in through `scratch`.
    fn run(
        &mut self,
        direction: Direction,
        offset: u64,
        from: &[Segment],
        to: &[Segment],
        bytes: usize,
    ) {
        let sector = self.xts.sector();
        let (mut from, mut to) = (Cursor::new(from), Cursor::new(to));
        let mut done = 0;
        while done < bytes {
            let (source, target) = (from.here(), to.here());
            let at = offset + done as u64;
            let straight = self
                .xts
                .run(direction, at, source.take(bytes - done), target);
            let moved = if straight > 0 {
                straight
            } else {
                let scratch = self.scratch.segment(0, sector);
                copy::between(from.rest, from.within, &[scratch], 0, sector);
                self.xts.run(direction, at, scratch, scratch);
                copy::between(&[scratch], 0, to.rest, to.within, sector);
                sector
            };
            from.advance(moved);
            to.advance(moved);
            done += moved;
        }
    }
}

/// A place in a list of segments.
struct Cursor<'a> {
    rest: &'a [Segment],
    /// Bytes of the first that are done.
    within: usize,
}

impl<'a> Cursor<'a> {
    fn new(rest: &'a [Segment]) -> Cursor<'a> {
        Cursor { rest, within: 0 }
    }

    /// What is left of the segment.
    fn here(&self) -> Segment {
        self.rest
            .first()
            .map_or(Segment::EMPTY, |first| first.skip(self.within))
    }

    fn advance(&mut self, bytes: usize) {
        self.within += bytes;
        while let [first, rest @ ..] = self.rest
            && self.within >= first.len()
        {
            self.within -= first.len();
            self.rest = rest;
        }
    }
}

/// A disk and what encrypts it, together for one turn.
#[derive(Debug)]
pub struct Crypted<'a, D> {
    crypt: &'a mut Crypt,
    disk: D,
}

impl<D: BlkIo> Crypted<'_, D> {
    /// Hands the rest of an operation to the disk.
    fn push(&mut self, token: Token) -> Result<(), Full> {
        let slot = &self.crypt.slots[usize::from(token.slot)];
        let offset = slot.offset + slot.done as u64;
        let rest;
        let segments = match slot.done {
            0 => &slot.list[..slot.count],
            done => {
                rest = slot.rest(done);
                &rest.0[..rest.1]
            }
        };
        let op = match slot.write {
            None => BlkOp::Read { offset, segments },
            Some(Durable(durable)) => BlkOp::Write {
                offset,
                segments,
                durable,
            },
        };
        self.disk.submit(token, op)
    }

    /// As [`Crypted::push`] for a new operation, which keeps no pieces when there is no room.
    fn push_new(&mut self, token: Token) -> Result<(), Full> {
        let pushed = self.push(token);
        if pushed.is_err() {
            self.crypt.give_back(token);
        }
        pushed
    }

    /// What an operation with pieces came to; `None` when it goes on.
    fn finish(&mut self, token: Token, result: Result<u32, i32>) -> Option<Completion> {
        let slot = &mut self.crypt.slots[usize::from(token.slot)];
        let mut result = result;
        if let Ok(moved) = result {
            slot.done = slot.bytes.min(slot.done + moved as usize);
            let whole = self.crypt.cipher.xts.whole(slot.done);
            if whole == 0 && moved > 0 {
                // The rest of the sector must come, or the part of it that was written is lost.
                match self.push(token) {
                    Ok(()) => return None,
                    Err(Full) => result = Err(EAGAIN),
                }
            } else {
                if slot.write.is_none() {
                    self.crypt.decrypt(token, whole);
                }
                result = Ok(u32::try_from(whole).unwrap_or(u32::MAX));
            }
        }
        self.crypt.give_back(token);
        Some(Completion { token, result })
    }
}

impl<D: BlkIo> BlkIo for Crypted<'_, D> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        match op {
            BlkOp::Read { offset, segments } => {
                let bytes = segments.iter().map(Segment::len).sum();
                self.crypt.take(token, offset, bytes)?;
                let target = &mut self.crypt.slots[usize::from(token.slot)].target;
                target.clear();
                target.extend_from_slice(segments);
                self.push_new(token)
            }
            BlkOp::Write {
                offset,
                segments,
                durable,
            } => {
                let bytes = segments.iter().map(Segment::len).sum();
                self.crypt.take(token, offset, bytes)?;
                self.crypt.slots[usize::from(token.slot)].write = Some(Durable(durable));
                self.crypt.encrypt(token, segments);
                self.push_new(token)
            }
            BlkOp::WriteZeroes { offset, bytes, .. } => {
                let zeroes = [self.crypt.zeroes.segment(0, PIECE_BYTES); PIECES_PER_OP];
                self.crypt.take(token, offset, bytes as usize)?;
                self.crypt.slots[usize::from(token.slot)].write = Some(Durable(false));
                self.crypt.encrypt(token, &zeroes);
                self.push_new(token)
            }
            op @ (BlkOp::Flush | BlkOp::Discard { .. }) => self.disk.submit(token, op),
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        loop {
            let Completion { token, result } = self.disk.reap()?;
            if self.crypt.slots[usize::from(token.slot)].count == 0 {
                return Some(Completion { token, result });
            }
            if let Some(completion) = self.finish(token, result) {
                return Some(completion);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight()
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests;
