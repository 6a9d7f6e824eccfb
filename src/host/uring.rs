//! `UringDisk`: a file or block device through the worker's io_uring.
//!
//! The description lives in the queue; the ring is the worker's and is lent for each turn. Direct
//! I/O asks for aligned buffers. A request whose buffers are not goes through a bounce buffer, and
//! never through the page cache: direct and cached writes to neighbouring sectors of one page lose
//! data (docs/decisions/0007).

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

/// A request that goes through memory of ours.
#[derive(Debug)]
struct Bounced {
    store: Store,
    /// Where a read goes in the end; empty for a write.
    target: Vec<Segment>,
}

/// One queue's access to a disk.
#[derive(Debug)]
pub struct UringDisk {
    disk: Arc<DiskFile>,
    attached: Option<Attached>,
    /// By slot of the request.
    bounced: Vec<Option<Bounced>>,
    unaligned: u64,
}

impl UringDisk {
    /// Access to `disk`, not attached to a ring yet.
    pub fn new(disk: Arc<DiskFile>) -> UringDisk {
        UringDisk {
            disk,
            attached: None,
            bounced: Vec::new(),
            unaligned: 0,
        }
    }

    /// Requests so far whose buffers did not suit direct I/O.
    pub fn unaligned(&self) -> u64 {
        self.unaligned
    }

    /// Registers with the worker's ring.
    ///
    /// # Errors
    /// When the ring takes no more files.
    pub fn attach(&mut self, ring: &mut Uring, in_flight: usize) -> io::Result<()> {
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

    /// Whether direct I/O takes these buffers as they are.
    fn suits(&self, segments: &[Segment]) -> bool {
        let (mem, len) = (
            self.disk.mem_align() as usize,
            self.disk.offset_align() as usize,
        );
        segments
            .iter()
            .all(|s| s.is_aligned(mem) && s.len().is_multiple_of(len))
    }

    /// Memory of ours in place of `segments`, with their bytes in it if they are to be written.
    #[cold]
    fn bounce(&mut self, slot: u16, segments: &[Segment], write: bool) -> io::Result<Segment> {
        let slot = usize::from(slot);
        if self.bounced.len() <= slot {
            self.bounced.resize_with(slot + 1, || None);
        }
        let bytes: usize = segments.iter().map(Segment::len).sum();
        // A mapping of its own is aligned to a page, which suits every device.
        let store = Store::new(bytes as u64)?;
        let segment = store.segment(0, bytes);
        let mut target = Vec::new();
        if write {
            copy::between(segments, 0, &[segment], 0, bytes);
        } else {
            target.extend_from_slice(segments);
        }
        self.bounced[slot] = Some(Bounced { store, target });
        Ok(segment)
    }

    /// The request in `slot` is done: what was read goes to where it was wanted.
    fn finish(&mut self, slot: u16, result: Result<u32, i32>) {
        let bounced = self
            .bounced
            .get_mut(usize::from(slot))
            .and_then(Option::take);
        if let (Some(Bounced { store, target }), Ok(moved)) = (bounced, result) {
            let moved = moved as usize;
            copy::between(&[store.segment(0, moved)], 0, &target, 0, moved);
        }
    }
}

/// A queue's disk and the worker's ring, together for one turn.
#[derive(Debug)]
pub struct Lent<'a> {
    queue: &'a mut UringDisk,
    ring: &'a mut Uring,
}

impl Lent<'_> {
    fn push(&mut self, token: Token, op: UringOp<'_>) -> Result<(), Full> {
        let attached = self.queue.attached.ok_or(Full)?;
        let tag = u64::from(token.slot) | (u64::from(token.generation) << 16);
        if self.ring.submit(attached.client, tag, op) {
            Ok(())
        } else {
            Err(Full)
        }
    }

    #[cold]
    fn submit_bounced(&mut self, token: Token, file: u32, op: BlkOp<'_>) -> Result<(), Full> {
        let (segments, write) = match op {
            BlkOp::Read { segments, .. } => (segments, false),
            BlkOp::Write { segments, .. } => (segments, true),
            BlkOp::Flush => (&[][..], false),
        };
        // No memory is no room: the request waits for others to end.
        let bounce = self
            .queue
            .bounce(token.slot, segments, write)
            .map_err(|_| Full)?;
        let segments = &[bounce][..];
        let op = match op {
            BlkOp::Read { offset, .. } => UringOp::Read {
                file,
                offset,
                segments,
            },
            BlkOp::Write {
                offset, durable, ..
            } => UringOp::Write {
                file,
                offset,
                segments,
                durable,
            },
            BlkOp::Flush => UringOp::Sync { file },
        };
        self.push(token, op)?;
        self.queue.unaligned += 1;
        Ok(())
    }
}

impl BlkIo for Lent<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let file = self.queue.attached.ok_or(Full)?.file;
        let op = match op {
            BlkOp::Read { segments, .. } | BlkOp::Write { segments, .. }
                if !self.queue.suits(segments) =>
            {
                return self.submit_bounced(token, file, op);
            }
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
        self.push(token, op)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the tag holds two 16-bit numbers"
    )]
    fn reap(&mut self) -> Option<Completion> {
        let (tag, result) = self.ring.reap(self.queue.attached?.client)?;
        let token = Token {
            slot: tag as u16,
            generation: (tag >> 16) as u16,
        };
        let result = u32::try_from(result).map_err(|_| -result);
        if !self.queue.bounced.is_empty() {
            self.queue.finish(token.slot, result);
        }
        Some(Completion { token, result })
    }

    fn in_flight(&self) -> usize {
        self.queue
            .attached
            .map_or(0, |attached| self.ring.in_flight(attached.client))
    }
}
