//! `UringDisk`: a file or block device through the worker's io_uring.
//!
//! The description lives in the queue; the ring is the worker's and is lent for each turn. Direct
//! I/O asks for aligned buffers. A request whose buffers are not goes through a bounce buffer, and
//! never through the page cache: direct and cached writes to neighbouring sectors of one page lose
//! data (docs/decisions/0007). Bounce buffers are few and of fixed size, however much a guest asks
//! for: a longer request is done in parts, as if the host had done short I/O.

use std::io;
use std::sync::Arc;

use crate::memory::{Segment, Store, copy};
use crate::sys::disk::DiskFile;
use crate::sys::uring::{ClientId, Uring, UringOp};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

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

/// What the ring gives back with a completion: the token, and which bounce buffer was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    token: Token,
    buffer: Option<u16>,
}

impl Tag {
    fn to_u64(self) -> u64 {
        let buffer = self.buffer.map_or(0, |buffer| u64::from(buffer) + 1);
        u64::from(self.token.slot) | (u64::from(self.token.generation) << 16) | (buffer << 32)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the tag holds three 16-bit numbers"
    )]
    fn from_u64(tag: u64) -> Tag {
        Tag {
            token: Token {
                slot: tag as u16,
                generation: (tag >> 16) as u16,
            },
            buffer: ((tag >> 32) as u16).checked_sub(1),
        }
    }
}

/// One queue's access to a disk.
#[derive(Debug)]
pub struct UringDisk {
    disk: Arc<DiskFile>,
    attached: Option<Attached>,
    /// There while attached, if the disk does direct I/O.
    bounces: Option<Bounces>,
    unaligned: u64,
}

impl UringDisk {
    /// Access to `disk`, not attached to a ring yet.
    pub fn new(disk: Arc<DiskFile>) -> UringDisk {
        UringDisk {
            disk,
            attached: None,
            bounces: None,
            unaligned: 0,
        }
    }

    /// Operations so far whose buffers did not suit direct I/O.
    pub fn unaligned(&self) -> u64 {
        self.unaligned
    }

    /// Registers with the worker's ring.
    ///
    /// # Errors
    /// When the ring takes no more files, or there is no memory for bounce buffers.
    pub fn attach(&mut self, ring: &mut Uring, in_flight: usize) -> io::Result<()> {
        if self.disk.is_direct() {
            self.bounces = Some(Bounces::new()?);
        }
        let file = ring.add_file(self.disk.file())?;
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
    }

    /// The disk for one turn.
    pub fn lend<'a>(&'a mut self, ring: &'a mut Uring) -> Lent<'a> {
        Lent { queue: self, ring }
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
            BlkOp::Flush => (&[][..], false),
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
            BlkOp::Flush => BlkOp::Flush,
        };
        let tag = Tag {
            token,
            buffer: Some(buffer),
        };
        let pushed = self.push(at, tag, op);
        match (&pushed, &mut self.queue.bounces) {
            (Err(Full), Some(bounces)) => bounces.free.push(buffer),
            _ => self.queue.unaligned += 1,
        }
        pushed
    }
}

impl BlkIo for Lent<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let at = self.queue.attached.ok_or(Full)?;
        match op {
            BlkOp::Read { segments, .. } | BlkOp::Write { segments, .. }
                if !self.queue.suits(segments) =>
            {
                self.push_bounced(at, token, op)
            }
            op => {
                let buffer = None;
                self.push(at, Tag { token, buffer }, op)
            }
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        let (tag, result) = self.ring.reap(self.queue.attached?.client)?;
        let Tag { token, buffer } = Tag::from_u64(tag);
        let result = u32::try_from(result).map_err(|_| -result);
        if let (Some(buffer), Some(bounces)) = (buffer, &mut self.queue.bounces) {
            bounces.give_back(buffer, result.unwrap_or(0));
        }
        Some(Completion { token, result })
    }

    fn in_flight(&self) -> usize {
        self.queue
            .attached
            .map_or(0, |attached| self.ring.in_flight(attached.client))
    }
}

#[cfg(test)]
mod tests;
