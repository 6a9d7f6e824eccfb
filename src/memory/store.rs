//! `Store`: memory of our own that a guest's disk is kept in (`ram:`).
//!
//! Zero pages until written, shared by all queues of the disk. Two queues may write the same
//! sector at the same time; what is read then is as undefined as on any disk.

use std::io;

use vm_memory::MmapRegion;

use super::Segment;

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
}
