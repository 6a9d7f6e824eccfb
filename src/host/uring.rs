//! `UringDisk`: a file or block device through the worker's io_uring.
//!
//! The description lives in the queue; the ring is the worker's and is lent for each turn. Direct
//! I/O asks for aligned buffers. A request whose buffers are not goes through a bounce buffer, and
//! never through the page cache: direct and cached writes to neighbouring sectors of one page lose
//! data (docs/decisions/0007). Bounce buffers are few and of fixed size, however much a guest asks
//! for: a longer request is done in parts, as if the host had done short I/O.
//!
//! A file in memory needs no ring (`at_once`).
//!
//! Ranges are zeroed by fallocate(2), which the kernel does beside the ring, for block devices too.
//! Discards punch holes into files. On a block device a hole is a range that reads as zeros, which
//! not all devices that discard can do (dm-thin, many SSDs): they have a command of their own. What
//! a kernel, file system or device can't do is learnt from its first answer: then the next best is
//! tried, zeros are written, and a discard, which is only a hint, does nothing.

use std::io;
use std::sync::Arc;

use crate::memory::{GuestRam, Segment, Store, copy};
use crate::sys::disk::{DiskFile, IoOptions};
use crate::sys::uring::{ClientId, Uring, UringOp, Zero};
use crate::sys::witness::Witness;

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

mod at_once;

use at_once::AtOnce;

/// A place in the worker's ring.
#[derive(Debug, Clone, Copy)]
struct Attached {
    client: ClientId,
    file: u32,
}

/// Bytes of one bounce buffer: a multiple of every alignment that direct I/O asks for.
const BOUNCE_BYTES: usize = 128 << 10;
/// Bounce buffers of a queue. Times [`BOUNCE_BYTES`], all the memory that its guest can make us
/// take.
const BOUNCES: u16 = 32;

/// Bytes of zeros that are written at a time where there is no other way.
const ZEROES_BYTES: usize = 128 << 10;
/// How often they are written by one operation.
const ZEROES_REPEATED: usize = 8;

// What the kernel says where it does not do what it is asked for; the same on every Linux. EINVAL
// comes from kernels whose io_uring has no such operation.
const EAGAIN: i32 = 11;
const EINVAL: i32 = 22;
const ENOSYS: i32 = 38;
const EOPNOTSUPP: i32 = 95;

/// The bounce buffers of a queue.
#[derive(Debug)]
struct Bounces {
    /// A mapping of its own, so aligned to a page; pages that are never used are never taken.
    store: Store,
    free: Vec<u16>,
    /// By buffer: where what is read into it goes in the end; empty for a write.
    targets: Box<[Vec<Segment>]>,
}

impl Bounces {
    fn new() -> io::Result<Bounces> {
        let bytes = u64::from(BOUNCES) * BOUNCE_BYTES as u64;
        Ok(Bounces {
            store: Store::new(bytes)?,
            free: (0..BOUNCES).rev().collect(),
            targets: (0..BOUNCES).map(|_| Vec::new()).collect(),
        })
    }

    fn segment(&self, buffer: u16, bytes: usize) -> Segment {
        let offset = u64::from(buffer) * BOUNCE_BYTES as u64;
        self.store.segment(offset, bytes.min(BOUNCE_BYTES))
    }

    /// A buffer in place of `segments`, or of as many of their first bytes as it holds; the bytes
    /// are in it if they are to be written. `None` when all buffers are in use.
    #[cold]
    fn take(&mut self, segments: &[Segment], write: bool) -> Option<(u16, Segment)> {
        let buffer = self.free.pop()?;
        let segment = self.segment(buffer, segments.iter().map(Segment::len).sum());
        let target = &mut self.targets[usize::from(buffer)];
        target.clear();
        if write {
            copy::between(segments, 0, &[segment], 0, segment.len());
        } else {
            target.extend_from_slice(segments);
        }
        Some((buffer, segment))
    }

    /// The operation is done: what was read goes to where it was wanted.
    #[cold]
    fn give_back(&mut self, buffer: u16, moved: u32) {
        let moved = moved as usize;
        let target = &self.targets[usize::from(buffer)];
        copy::between(&[self.segment(buffer, moved)], 0, target, 0, moved);
        self.free.push(buffer);
    }
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Moves data.
    Move,
    /// Moves data and makes it durable.
    Durable,
    /// Makes what was moved durable.
    Sync,
    /// Discards.
    Discard(Discard),
    /// Zeroes.
    Zero(Zero),
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::Move,
        Kind::Discard(Discard::Command),
        Kind::Discard(Discard::Hole),
        Kind::Discard(Discard::Nothing),
        Kind::Zero(Zero::Punch),
        Kind::Zero(Zero::Keep),
        Kind::Sync,
        Kind::Durable,
    ];

    /// Of an operation on data or on the whole disk.
    fn of(op: &BlkOp<'_>) -> Kind {
        match op {
            BlkOp::Flush => Kind::Sync,
            BlkOp::Write { durable: true, .. } => Kind::Durable,
            _ => Kind::Move,
        }
    }
}

/// How ranges are discarded; what can't be done becomes the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Discard {
    /// By the command of block devices.
    Command,
    /// By fallocate(2).
    Hole,
    /// Not at all.
    Nothing,
}

impl Discard {
    /// The best that is worth trying on `disk`.
    fn on(disk: &DiskFile) -> Discard {
        match disk.topology() {
            // A hole would be zeros that the device writes.
            topology if topology.discard_max == 0 => Discard::Nothing,
            _ if disk.is_regular() => Discard::Hole,
            _ => Discard::Command,
        }
    }
}

/// What the ring gives back with a completion: the token, which bounce buffer was used, and what
/// was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    token: Token,
    buffer: Option<u16>,
    kind: Kind,
}

impl Tag {
    fn to_u64(self) -> u64 {
        let buffer = self.buffer.map_or(0, |buffer| u64::from(buffer) + 1);
        let kind = match self.kind {
            Kind::Move => 0,
            Kind::Discard(Discard::Command) => 1,
            Kind::Discard(Discard::Hole) => 2,
            Kind::Discard(Discard::Nothing) => 3,
            Kind::Zero(Zero::Punch) => 4,
            Kind::Zero(Zero::Keep) => 5,
            Kind::Sync => 6,
            Kind::Durable => 7,
        };
        let token = u64::from(self.token.slot) | (u64::from(self.token.generation) << 16);
        token | (buffer << 32) | (kind << 48)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the tag holds three 16-bit numbers and a kind"
    )]
    fn from_u64(tag: u64) -> Tag {
        Tag {
            token: Token {
                slot: tag as u16,
                generation: (tag >> 16) as u16,
            },
            buffer: ((tag >> 32) as u16).checked_sub(1),
            kind: Kind::ALL[(tag >> 48) as usize],
        }
    }
}

/// One queue's access to a disk.
#[derive(Debug)]
pub struct UringDisk {
    disk: Arc<DiskFile>,
    attached: Option<Attached>,
    at_once: AtOnce,
    /// There while attached, if the disk does direct I/O.
    bounces: Option<Bounces>,
    /// Flushes and durable writes come here.
    makes_durable: bool,
    /// There while attached, if they do and the page cache is written to.
    witness: Option<Witness>,
    unaligned: u64,
    ranges: Ranges,
}

/// What is needed to discard and zero.
#[derive(Debug)]
struct Ranges {
    discard: Discard,
    /// Whether the file can have holes punched, as far as is known.
    punch: bool,
    /// Whether it can have ranges zeroed that stay allocated, as far as is known.
    keep: bool,
    /// By slot: offset and bytes of the operation in flight.
    places: Box<[(u64, u32)]>,
    /// Zeros to be written; there while attached.
    zeroes: Option<Store>,
}

impl UringDisk {
    /// Access to `disk`, not attached to a ring yet.
    pub fn new(disk: Arc<DiskFile>) -> UringDisk {
        UringDisk {
            at_once: AtOnce::new(),
            attached: None,
            bounces: None,
            makes_durable: true,
            witness: None,
            unaligned: 0,
            ranges: Ranges {
                discard: Discard::on(&disk),
                punch: true,
                keep: true,
                places: Box::default(),
                zeroes: None,
            },
            disk,
        }
    }

    /// The same, for reads and writes that somebody else makes durable.
    pub fn without_syncs(disk: Arc<DiskFile>) -> UringDisk {
        UringDisk {
            makes_durable: false,
            ..UringDisk::new(disk)
        }
    }

    /// Operations so far whose buffers did not suit direct I/O.
    pub fn unaligned(&self) -> u64 {
        self.unaligned
    }

    /// Operations so far that needed no device.
    pub fn at_once(&self) -> u64 {
        self.at_once.moved()
    }

    /// Whether something is done that was not reaped, and of which the ring tells nothing.
    pub fn has_done(&self) -> bool {
        self.at_once.in_flight() > 0
    }

    /// Whether most operations need no device.
    #[inline]
    pub fn is_in_memory(&self) -> bool {
        self.disk.is_in_memory()
    }

    /// Lets others see what was written; before the driver is told.
    #[inline]
    pub fn settle(&mut self) {
        self.at_once.settle();
    }

    /// Whether others need not see yet what was written.
    #[cfg(test)]
    pub(crate) fn is_unsettled(&self) -> bool {
        self.at_once.is_unsettled()
    }

    /// What is asked of the ring beside the usual.
    pub fn io(&self) -> IoOptions {
        self.disk.io()
    }

    /// Operations in the ring that it is attached to, done or not.
    pub fn in_ring(&self, ring: &Uring) -> usize {
        self.attached.map_or(0, |at| ring.in_flight(at.client))
    }

    /// Registers with the worker's ring.
    ///
    /// # Errors
    /// When the ring takes no more files, the system opens none, or there is no memory for bounce
    /// buffers.
    pub fn attach(&mut self, ring: &mut Uring, in_flight: usize) -> io::Result<()> {
        if self.disk.is_direct() {
            self.bounces = Some(Bounces::new()?);
        }
        if self.makes_durable {
            self.witness = self.disk.witness()?;
        }
        self.at_once.attach(in_flight);
        self.ranges.places = vec![(0, 0); in_flight].into();
        self.ranges.zeroes = Some(Store::new(ZEROES_BYTES as u64)?);
        let file = match self.disk.io().iopoll {
            true => ring.add_polled_file(self.disk.file())?,
            false => ring.add_file(self.disk.file())?,
        };
        let client = ring.add_client(in_flight);
        self.attached = Some(Attached { client, file });
        Ok(())
    }

    /// Takes everything out of the ring; nothing may be in flight.
    pub fn detach(&mut self, ring: &mut Uring) {
        if let Some(attached) = self.attached.take() {
            ring.remove_client(attached.client);
            ring.remove_file(attached.file);
        }
        self.witness = None;
    }

    /// Registers guest memory with the ring, if that is asked for. Where it can't be, or not all of
    /// it, a log line says so, and the disk does without.
    pub fn pin(&self, ring: &mut Uring, ram: &GuestRam) {
        if self.disk.io().fixed_buffers
            && let Err(error) = ring.add_memory(&ram.memory())
        {
            let bytes: usize = ram.memory().iter().map(Segment::len).sum();
            tracing::warn!(
                "fixed_buffers: {bytes} bytes of guest memory can't be pinned ({error}): \
                 doing without where it isn't"
            );
        }
    }

    /// Takes guest memory out of the ring again, before it is unmapped.
    pub fn unpin(&self, ring: &mut Uring, ram: &GuestRam) {
        if self.disk.io().fixed_buffers {
            ring.remove_memory(&ram.memory());
        }
    }

    /// The disk for one turn.
    pub fn lend<'a>(&'a mut self, ring: &'a mut Uring) -> Lent<'a> {
        self.at_once.begin_turn();
        Lent { queue: self, ring }
    }

    /// What a sync or a durable write came to. The kernel's own answer may be that all is well, and
    /// what was lost have been told to another queue, or to another request of this one.
    fn made_durable(&self, kind: Kind, result: Result<u32, i32>) -> Result<u32, i32> {
        self.disk.heed(self.witness.as_ref());
        match kind {
            Kind::Durable => self.disk.wrote_durably(result),
            _ => self.disk.synced(result),
        }
    }

    /// Whether the disk takes these buffers as they are.
    fn suits(&self, segments: &[Segment]) -> bool {
        let (mem, len) = (
            self.disk.mem_align() as usize,
            self.disk.offset_align() as usize,
        );
        segments
            .iter()
            .all(|s| s.is_aligned(mem) && s.len().is_multiple_of(len))
    }
}

/// A queue's disk and the worker's ring, together for one turn.
#[derive(Debug)]
pub struct Lent<'a> {
    queue: &'a mut UringDisk,
    ring: &'a mut Uring,
}

impl Lent<'_> {
    fn push(&mut self, at: Attached, tag: Tag, op: BlkOp<'_>) -> Result<(), Full> {
        let file = at.file;
        let op = match op {
            BlkOp::Read { offset, segments } => UringOp::Read {
                file,
                offset,
                segments,
            },
            BlkOp::Write {
                offset,
                segments,
                durable,
            } => UringOp::Write {
                file,
                offset,
                segments,
                durable,
            },
            BlkOp::Flush => UringOp::Sync { file },
            // These have their own way.
            BlkOp::Discard { .. } | BlkOp::WriteZeroes { .. } => UringOp::Nothing,
        };
        if self.ring.submit(at.client, tag.to_u64(), op) {
            Ok(())
        } else {
            Err(Full)
        }
    }

    #[cold]
    fn push_bounced(&mut self, at: Attached, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let (segments, write) = match op {
            BlkOp::Read { segments, .. } => (segments, false),
            BlkOp::Write { segments, .. } => (segments, true),
            _ => (&[][..], false),
        };
        // A buffer in use belongs to an operation in flight, so a full pool empties.
        let bounces = self.queue.bounces.as_mut().ok_or(Full)?;
        let (buffer, segment) = bounces.take(segments, write).ok_or(Full)?;
        let segments = &[segment][..];
        let op = match op {
            BlkOp::Read { offset, .. } => BlkOp::Read { offset, segments },
            BlkOp::Write {
                offset, durable, ..
            } => BlkOp::Write {
                offset,
                segments,
                durable,
            },
            op => op,
        };
        let tag = Tag {
            token,
            buffer: Some(buffer),
            kind: Kind::of(&op),
        };
        let pushed = self.push(at, tag, op);
        match (&pushed, &mut self.queue.bounces) {
            (Err(Full), Some(bounces)) => bounces.free.push(buffer),
            _ => self.queue.unaligned += 1,
        }
        pushed
    }

    /// Discards or zeroes in the best way that is left.
    #[cold]
    fn push_range(&mut self, at: Attached, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let (offset, bytes, unmap) = match op {
            BlkOp::Discard { offset, bytes } => (offset, bytes, None),
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => (offset, bytes, Some(unmap)),
            _ => return Err(Full),
        };
        let align = self.queue.disk.topology().zero_align;
        let aligned = offset.is_multiple_of(align.into()) && bytes.is_multiple_of(align);
        let ranges = &self.queue.ranges;
        let (punch, keep) = (ranges.punch && aligned, ranges.keep && aligned);
        let file = at.file;
        let zero = |how| UringOp::Zero {
            file,
            offset,
            bytes,
            how,
        };
        let (kind, op) = match unmap {
            None => {
                let how = match aligned {
                    true => ranges.discard,
                    false => Discard::Nothing,
                };
                let op = match how {
                    Discard::Command => UringOp::Discard {
                        file,
                        offset,
                        bytes,
                    },
                    Discard::Hole => zero(Zero::Punch),
                    Discard::Nothing => UringOp::Nothing,
                };
                (Kind::Discard(how), op)
            }
            Some(true) if punch => (Kind::Zero(Zero::Punch), zero(Zero::Punch)),
            Some(_) if keep => (Kind::Zero(Zero::Keep), zero(Zero::Keep)),
            Some(_) => return self.push_zeroes(at, token, offset, bytes),
        };
        self.push_ring(at, token, kind, (offset, bytes), op)
    }

    fn push_ring(
        &mut self,
        at: Attached,
        token: Token,
        kind: Kind,
        place: (u64, u32),
        op: UringOp<'_>,
    ) -> Result<(), Full> {
        let tag = Tag {
            token,
            buffer: None,
            kind,
        };
        if !self.ring.submit(at.client, tag.to_u64(), op) {
            return Err(Full);
        }
        self.queue.ranges.places[usize::from(token.slot)] = place;
        Ok(())
    }

    /// Writes zeros over as much of a range as there are zeros for.
    fn push_zeroes(
        &mut self,
        at: Attached,
        token: Token,
        offset: u64,
        bytes: u32,
    ) -> Result<(), Full> {
        let zeroes = self.queue.ranges.zeroes.as_ref().ok_or(Full)?;
        let mut left = bytes as usize;
        let segments: [Segment; ZEROES_REPEATED] = core::array::from_fn(|_| {
            let segment = zeroes.segment(0, left.min(ZEROES_BYTES));
            left -= segment.len();
            segment
        });
        let used = (bytes as usize).div_ceil(ZEROES_BYTES).min(ZEROES_REPEATED);
        let op = BlkOp::Write {
            offset,
            segments: &segments[..used],
            durable: false,
        };
        let tag = Tag {
            token,
            buffer: None,
            kind: Kind::Move,
        };
        self.push(at, tag, op)
    }

    /// What a range's operation came to, from what the kernel answered.
    #[cold]
    fn finish_range(&mut self, token: Token, kind: Kind, result: i32) -> Completion {
        let ranges = &mut self.queue.ranges;
        let (offset, bytes) = ranges.places[usize::from(token.slot)];
        // Others may have asked for these pages while they were there.
        self.queue.at_once.forget(&self.queue.disk, offset, bytes);
        let cannot = matches!(-result, EOPNOTSUPP | ENOSYS | EINVAL);
        let result = match u32::try_from(result) {
            Ok(_) => Ok(bytes),
            // Again, in another way.
            Err(_) if cannot => Err(EAGAIN),
            Err(_) => Err(-result),
        };
        match kind {
            _ if !cannot => {}
            // Those that were sent before the first was answered may come later.
            Kind::Discard(Discard::Command) if ranges.discard == Discard::Command => {
                ranges.discard = Discard::Hole;
            }
            Kind::Discard(Discard::Hole) => ranges.discard = Discard::Nothing,
            Kind::Zero(Zero::Punch) => ranges.punch = false,
            Kind::Zero(Zero::Keep) => ranges.keep = false,
            Kind::Discard(_) | Kind::Move | Kind::Durable | Kind::Sync => {}
        }
        Completion { token, result }
    }
}

impl BlkIo for Lent<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let at = self.queue.attached.ok_or(Full)?;
        let queue = &mut *self.queue;
        if queue.at_once.submit(&queue.disk, token, op) {
            return Ok(());
        }
        match op {
            BlkOp::Read { segments, .. } | BlkOp::Write { segments, .. }
                if !self.queue.suits(segments) =>
            {
                self.push_bounced(at, token, op)
            }
            BlkOp::Discard { .. } | BlkOp::WriteZeroes { .. } => self.push_range(at, token, op),
            op => {
                let tag = Tag {
                    token,
                    buffer: None,
                    kind: Kind::of(&op),
                };
                self.push(at, tag, op)
            }
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.queue.at_once.reap(&self.queue.disk) {
            return Some(completion);
        }
        let (tag, result) = self.ring.reap(self.queue.attached?.client)?;
        let Tag {
            token,
            buffer,
            kind,
        } = Tag::from_u64(tag);
        if matches!(kind, Kind::Discard(_) | Kind::Zero(_)) {
            return Some(self.finish_range(token, kind, result));
        }
        let mut result = u32::try_from(result).map_err(|_| -result);
        if matches!(kind, Kind::Sync | Kind::Durable) {
            result = self.queue.made_durable(kind, result);
        }
        if let (Some(buffer), Some(bounces)) = (buffer, &mut self.queue.bounces) {
            bounces.give_back(buffer, result.unwrap_or(0));
        }
        Some(Completion { token, result })
    }

    fn in_flight(&self) -> usize {
        let ring = self.queue.attached.map(|at| self.ring.in_flight(at.client));
        ring.unwrap_or(0) + self.queue.at_once.in_flight()
    }
}

#[cfg(test)]
mod tests;
