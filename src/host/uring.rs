//! `UringDisk`: a file or block device through the worker's io_uring.
//!
//! The description lives in the queue; the ring is the worker's and is lent for each turn.

use std::io;
use std::sync::Arc;

use crate::memory::Segment;
use crate::sync::Counter;
use crate::sys::disk::DiskFile;
use crate::sys::uring::{ClientId, Uring, UringOp};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// Registered places of a disk's files in a ring.
#[derive(Debug, Clone, Copy)]
struct Attached {
    client: ClientId,
    file: u32,
    buffered: Option<u32>,
}

/// One queue's access to a disk.
#[derive(Debug)]
pub struct UringDisk {
    disk: Arc<DiskFile>,
    attached: Option<Attached>,
    /// Operations that went through the page cache because their buffers don't suit direct I/O.
    unaligned: Counter,
}

impl UringDisk {
    /// Access to `disk`, not attached to a ring yet.
    pub fn new(disk: Arc<DiskFile>) -> UringDisk {
        UringDisk {
            disk,
            attached: None,
            unaligned: Counter::new(),
        }
    }

    /// Operations so far that went through the page cache because their buffers don't suit direct
    /// I/O.
    pub fn unaligned(&self) -> u64 {
        self.unaligned.get()
    }

    /// Registers with the worker's ring.
    ///
    /// # Errors
    /// When the ring takes no more files.
    pub fn attach(&mut self, ring: &mut Uring, in_flight: usize) -> io::Result<()> {
        let file = ring.add_file(self.disk.file())?;
        let buffered = match self.disk.buffered() {
            None => None,
            Some(buffered) => match ring.add_file(buffered) {
                Ok(place) => Some(place),
                Err(error) => {
                    ring.remove_file(file);
                    return Err(error);
                }
            },
        };
        let client = ring.add_client(in_flight);
        self.attached = Some(Attached {
            client,
            file,
            buffered,
        });
        Ok(())
    }

    /// Takes everything out of the ring; nothing may be in flight.
    pub fn detach(&mut self, ring: &mut Uring) {
        if let Some(attached) = self.attached.take() {
            ring.remove_client(attached.client);
            ring.remove_file(attached.file);
            if let Some(buffered) = attached.buffered {
                ring.remove_file(buffered);
            }
        }
    }

    /// The disk for one turn.
    pub fn lend<'a>(&'a self, ring: &'a mut Uring) -> Lent<'a> {
        Lent { queue: self, ring }
    }

    /// Whether direct I/O takes an operation as it is.
    fn suits(&self, offset: u64, segments: &[Segment]) -> bool {
        let (mem, disk) = (self.disk.mem_align() as usize, self.disk.offset_align());
        let suits = |s: &Segment| s.is_aligned(mem) && s.len().is_multiple_of(disk as usize);
        offset.is_multiple_of(u64::from(disk)) && segments.iter().all(suits)
    }
}

/// A queue's disk and the worker's ring, together for one turn.
#[derive(Debug)]
pub struct Lent<'a> {
    queue: &'a UringDisk,
    ring: &'a mut Uring,
}

impl BlkIo for Lent<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let Some(attached) = self.queue.attached else {
            return Err(Full);
        };
        let (file, op_is_unaligned) = match (attached.buffered, op) {
            (
                Some(buffered),
                BlkOp::Read { offset, segments }
                | BlkOp::Write {
                    offset, segments, ..
                },
            ) if !self.queue.suits(offset, segments) => (buffered, true),
            _ => (attached.file, false),
        };
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
        let tag = u64::from(token.slot) | (u64::from(token.generation) << 16);
        if !self.ring.submit(attached.client, tag, op) {
            return Err(Full);
        }
        self.queue.unaligned.add(u64::from(op_is_unaligned));
        Ok(())
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
        Some(Completion {
            token,
            result: u32::try_from(result).map_err(|_| -result),
        })
    }

    fn in_flight(&self) -> usize {
        self.queue
            .attached
            .map_or(0, |attached| self.ring.in_flight(attached.client))
    }
}
