//! A file in memory is read and written by the worker itself, before anything is submitted.
//!
//! A file system in memory (tmpfs) can't promise io_uring not to wait, so that each operation would
//! be passed to a thread of the kernel and back. What is known to have memory is copied from and to
//! a mapping of the file; of the rest the kernel is asked. Hits in the page cache of other file
//! systems are copied by io_uring itself at once: there nothing is gained (docs/decisions/0010).

use crate::host::blk::{BlkOp, Completion, Token};
use crate::host::copies::Copies;
use crate::memory::{FileMap, Segment};
use crate::sys::disk::DiskFile;
use crate::sys::rw;

use super::EAGAIN;

/// Bytes that a queue copies in a turn at most, so that the worker's other queues are not kept
/// waiting by it. What is more goes the long way.
const BYTES_PER_TURN: usize = 1 << 20;

/// The operations of a queue that are done at once.
#[derive(Debug)]
pub(super) struct AtOnce {
    copies: Copies,
    /// Bytes that may still be copied in this turn.
    left: usize,
    moved: u64,
    /// The log has it that the file was cut.
    is_told: bool,
}

impl AtOnce {
    pub(super) fn new() -> AtOnce {
        AtOnce {
            copies: Copies::default(),
            left: BYTES_PER_TURN,
            moved: 0,
            is_told: false,
        }
    }

    /// Room for `in_flight` operations.
    pub(super) fn attach(&mut self, in_flight: usize) {
        self.copies.reserve(in_flight);
    }

    #[inline]
    pub(super) fn begin_turn(&mut self) {
        self.left = BYTES_PER_TURN;
    }

    /// Operations so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Operations that were not reaped yet.
    #[inline]
    pub(super) fn in_flight(&self) -> usize {
        self.copies.in_flight()
    }

    /// Lets others see what was written; before the driver is told.
    #[inline]
    pub(super) fn settle(&mut self) {
        self.copies.settle();
    }

    #[cfg(test)]
    pub(super) fn is_unsettled(&self) -> bool {
        self.copies.is_unsettled()
    }

    /// The next operation that is done.
    #[inline]
    pub(super) fn reap(&mut self, disk: &DiskFile) -> Option<Completion> {
        let (mut completion, is_copy) = self.copies.reap()?;
        if is_copy && disk.map().is_some_and(FileMap::is_torn) {
            self.tell_torn(disk);
            completion.result = Err(EAGAIN);
        }
        Some(completion)
    }

    /// Part of the file was gone: the kernel says which.
    #[cold]
    fn tell_torn(&mut self, disk: &DiskFile) {
        if !core::mem::replace(&mut self.is_told, true) {
            tracing::warn!(
                "{:?}: a page of it was missing (the file was cut, or its file system is full): \
                 read and written by system calls from now on, until the daemon is started again",
                disk.path()
            );
        }
    }

    /// Does `op`, or returns `false` where the ring has to.
    #[inline]
    pub(super) fn submit(&mut self, disk: &DiskFile, token: Token, op: BlkOp<'_>) -> bool {
        if !disk.is_in_memory() {
            return false;
        }
        match op {
            BlkOp::Read { offset, segments } => {
                let Some(bytes) = self.share(segments) else {
                    return false;
                };
                match disk.map().and_then(|map| map.segment(offset, bytes)) {
                    Some(stored) => self.copies.read(token, stored, segments),
                    None => {
                        let done = rw::read(disk.file(), offset, segments);
                        self.by_call(disk, token, offset, done);
                    }
                }
            }
            // Memory is as durable as it gets.
            BlkOp::Write {
                offset, segments, ..
            } => {
                let Some(bytes) = self.share(segments) else {
                    return false;
                };
                match disk.map().and_then(|map| map.segment(offset, bytes)) {
                    Some(stored) => self.copies.write(token, stored, segments, disk.bytes()),
                    None => {
                        let done = rw::write(disk.file(), offset, segments);
                        self.by_call(disk, token, offset, done);
                    }
                }
            }
            BlkOp::Flush => self.copies.done(token, Ok(0)),
            BlkOp::Discard { offset, bytes } | BlkOp::WriteZeroes { offset, bytes, .. } => {
                self.forget(disk, offset, bytes);
                return false;
            }
        }
        self.moved += 1;
        true
    }

    /// What a system call came to.
    #[cold]
    fn by_call(&mut self, disk: &DiskFile, token: Token, offset: u64, done: Result<u32, i32>) {
        if let (Ok(bytes), Some(map)) = (done, disk.map()) {
            map.learn(offset, bytes as usize);
        }
        self.copies.done(token, done);
    }

    /// A range loses its memory, or has lost it.
    #[inline]
    pub(super) fn forget(&self, disk: &DiskFile, offset: u64, bytes: u32) {
        if let Some(map) = disk.map() {
            map.forget(offset, bytes as usize);
        }
    }

    /// How many bytes these are, if so much may still be copied in this turn.
    #[inline]
    fn share(&mut self, segments: &[Segment]) -> Option<usize> {
        let bytes = segments.iter().map(Segment::len).sum();
        self.left = self.left.checked_sub(bytes)?;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests;
