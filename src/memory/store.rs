//! `Store`: memory of our own that a guest's disk is kept in (`ram:`).
//!
//! Zero pages until written, shared by all queues of the disk. Two queues may write the same
//! sector at the same time; what is read then is as undefined as on any disk.

use std::io;

use vm_memory::MmapRegion;

use super::{Segment, copy};

/// What memory is given back in.
const PAGE: usize = 4096;

/// A range of zero-initialised memory.
#[derive(Debug)]
pub struct Store {
    map: MmapRegion<()>,
}

impl Store {
    /// `bytes` bytes, reserved now and taken page by page when they are written.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn new(bytes: u64) -> io::Result<Store> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::new(bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Store { map })
    }

    /// The bytes from `offset` on, `len` at most; valid as long as the store.
    pub fn segment(&self, offset: u64, len: usize) -> Segment {
        let offset = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(self.map.size());
        let len = len.min(self.map.size() - offset);
        Segment::new(self.map.as_ptr().wrapping_add(offset), len)
    }

    /// Makes the `bytes` bytes from `offset` on zero, and gives their memory back when `release`
    /// says so. Returns the bytes that are zero now: fewer at the end of the store.
    pub fn zero(&self, offset: u64, bytes: usize, release: bool) -> usize {
        let whole = self.segment(offset, bytes);
        let head = whole.base().align_offset(PAGE).min(whole.len());
        let pages = whole.skip(head).take((whole.len() - head) / PAGE * PAGE);
        if !release || pages.is_empty() || !give_back(pages) {
            return copy::zero(&[whole], 0, whole.len());
        }
        let tail = whole.skip(head + pages.len());
        copy::zero(&[whole.take(head), tail], 0, head + tail.len());
        whole.len()
    }
}

/// The kernel takes whole pages of a private mapping and has zeros there from now on. `false` when
/// it does not (locked memory).
fn give_back(pages: Segment) -> bool {
    // SAFETY: the pages lie in our own private anonymous mapping; nothing but disk data is there.
    unsafe { libc::madvise(pages.base().cast(), pages.len(), libc::MADV_DONTNEED) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_range_becomes_zero_with_and_without_its_memory() {
        for release in [false, true] {
            for (offset, bytes) in [
                (0, 512),
                (512, 20000),
                (4096, 8192),
                (4095, 2),
                (60000, 9999),
            ] {
                let store = Store::new(65536).unwrap();
                let all = [store.segment(0, 65536)];
                copy::write(&all, 0, &[0x5a; 65536]);
                let end = (offset + bytes).min(65536);
                let done = store.zero(offset as u64, bytes, release);
                assert_eq!(done, end - offset);
                let mut want = vec![0x5a; 65536];
                want[offset..end].fill(0);
                let mut got = vec![0; 65536];
                copy::read(&all, 0, &mut got);
                assert!(got == want, "{offset}+{bytes}, release {release}");
            }
        }
    }
}
