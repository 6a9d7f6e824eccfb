//! Guest memory that is registered with a ring, so that the kernel looks up and pins its pages once
//! and not for each operation.
//!
//! The pages stay those that they were when they were registered, whatever becomes of the mapping:
//! for what that means see docs/operations.md. Who registers memory takes it out again before it is
//! unmapped.

use std::io;

use io_uring::IoUring;

use crate::memory::Segment;

/// Pieces at most.
const BUFFERS_MAX: u16 = 2048;
/// Bytes that the kernel takes as one piece.
const PIECE_BYTES: usize = 1 << 30;

/// One piece of registered memory.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    /// First address.
    start: usize,
    len: usize,
    /// What the kernel calls it.
    place: u16,
    /// How often it was added.
    users: u32,
}

impl Buffer {
    fn is(&self, piece: &Segment) -> bool {
        self.start == piece.base().addr() && self.len == piece.len()
    }
}

/// The registered memory of a ring.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// By address; no two overlap, since all of them are mapped.
    list: Vec<Buffer>,
    free: Vec<u16>,
    /// Whether the kernel has a table for them.
    has_table: bool,
}

impl Buffers {
    /// The kernel's name for the piece that holds all of `segment`.
    #[inline]
    pub(super) fn find(&self, segment: &Segment) -> Option<u16> {
        let start = segment.base().addr();
        let behind = self.list.partition_point(|buffer| buffer.start <= start);
        let buffer = self.list.get(behind.checked_sub(1)?)?;
        let end = buffer.start + buffer.len;
        (start < end && segment.len() <= end - start).then_some(buffer.place)
    }

    /// Registers `memory`, or counts once more what is registered. What was registered before an
    /// error stays.
    pub(super) fn add(&mut self, ring: &IoUring, memory: &[Segment]) -> io::Result<()> {
        if !self.has_table {
            let submitter = ring.submitter();
            submitter.register_buffers_sparse(BUFFERS_MAX.into())?;
            self.free = (0..BUFFERS_MAX).rev().collect();
            self.has_table = true;
        }
        for piece in pieces(memory) {
            if let Some(known) = self.list.iter_mut().find(|buffer| buffer.is(&piece)) {
                known.users += 1;
                continue;
            }
            let full = || io::Error::other(format!("all {BUFFERS_MAX} places are in use"));
            let place = *self.free.last().ok_or_else(full)?;
            update(ring, place, piece)?;
            self.free.pop();
            let start = piece.base().addr();
            let at = self.list.partition_point(|buffer| buffer.start < start);
            let buffer = Buffer {
                start,
                len: piece.len(),
                place,
                users: 1,
            };
            self.list.insert(at, buffer);
        }
        Ok(())
    }

    /// Counts once less; what nobody counts any more is taken out. Operations in flight keep it.
    pub(super) fn remove(&mut self, ring: &IoUring, memory: &[Segment]) {
        for piece in pieces(memory) {
            let Some(at) = self.list.iter().position(|buffer| buffer.is(&piece)) else {
                continue;
            };
            self.list[at].users -= 1;
            if self.list[at].users == 0 {
                let place = self.list.remove(at).place;
                // The place is ours, so the kernel has no reason to refuse; if it does, the place
                // is not used again.
                if update(ring, place, Segment::EMPTY).is_ok() {
                    self.free.push(place);
                }
            }
        }
    }

    /// Pieces that are registered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }
}

/// Puts `memory` at `place` of the kernel's table.
fn update(ring: &IoUring, place: u16, memory: Segment) -> io::Result<()> {
    // A segment is laid out as an iovec.
    let list = core::ptr::from_ref(&memory).cast::<libc::iovec>();
    // SAFETY: `list` is one iovec, which lives until the call is over.
    let list = unsafe { core::slice::from_raw_parts(list, 1) };
    // SAFETY: the memory is mapped, or there is none; who added it removes it before that ends.
    unsafe {
        ring.submitter()
            .register_buffers_update(place.into(), list, None)
    }
}

/// `memory` in pieces that the kernel takes.
fn pieces(memory: &[Segment]) -> impl Iterator<Item = Segment> + '_ {
    memory.iter().flat_map(|segment| {
        let starts = (0..segment.len()).step_by(PIECE_BYTES);
        starts.map(|start| segment.skip(start).take(PIECE_BYTES))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Store;

    fn ring() -> IoUring {
        IoUring::new(8).unwrap()
    }

    #[test]
    fn memory_is_found_while_somebody_has_it_registered() {
        let (ring, mut buffers) = (ring(), Buffers::default());
        let store = Store::new(1 << 20).unwrap();
        let segment = |at: u64, len| store.segment(at, len);
        assert_eq!(buffers.find(&segment(0, 1)), None);
        // Two pieces with a hole between them.
        let memory = [segment(65536, 65536), segment(262_144, 65536)];
        buffers.add(&ring, &memory).unwrap();
        buffers.add(&ring, &memory[1..]).unwrap();
        let places = [0, 1].map(|number| buffers.find(&memory[number]));
        assert!(places[0].is_some() && places[1].is_some() && places[0] != places[1]);
        for (at, len, want) in [
            (65535, 1, None),
            (65536, 1, places[0]),
            (131_071, 1, places[0]),
            (131_071, 2, None),
            (131_072, 1, None),
            (262_143, 2, None),
            (300_000, 27680, places[1]),
            (300_000, 27681, None),
        ] {
            assert_eq!(buffers.find(&segment(at, len)), want, "{at}+{len}");
        }
        buffers.remove(&ring, &memory);
        assert_eq!(buffers.find(&memory[0]), None);
        assert_eq!(buffers.find(&memory[1]), places[1]);
        buffers.remove(&ring, &memory);
        assert_eq!((buffers.find(&memory[1]), buffers.len()), (None, 0));
        // Nothing of that is there any more.
        buffers.remove(&ring, &memory);
        assert_eq!(buffers.free.len(), usize::from(BUFFERS_MAX));
    }

    #[test]
    fn large_memory_is_cut_into_pieces() {
        let store = Store::new(5 << 29).unwrap();
        let memory = [store.segment(0, 5 << 29)];
        let cut: Vec<_> = pieces(&memory).collect();
        let lens: Vec<_> = cut.iter().map(Segment::len).collect();
        assert_eq!(lens, [1 << 30, 1 << 30, 1 << 29]);
        let second = store.segment(1 << 30, 1).base();
        assert_eq!(cut[1].base(), second);
    }
}
