//! A translated guest buffer, and a fixed-capacity list of them.
//!
//! A [`Segment`] is an address in this process that [`super::GuestRam::translate`] checked. It is
//! laid out as an `iovec`, so that a slice of segments goes to `readv`, `writev` and io_uring as it
//! is. It stays valid as long as the `GuestRam` that made it: whoever keeps segments past a burst
//! keeps that table too (docs/safety.md).

/// Segments that one [`Segments`] list can hold: a chain of the largest ring, each descriptor
/// spanning two regions. Pages of the list that are never used are never touched.
pub const SEGMENTS_MAX: usize = 2 * 32768;

/// One contiguous piece of guest memory in our address space.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; sending it moves no ownership, and every access to
// guest memory tolerates concurrent change.
unsafe impl Send for Segment {}
// SAFETY: as above, a shared segment only exposes its address and length by value.
unsafe impl Sync for Segment {}

impl Segment {
    /// An empty segment, for fixed tables.
    pub const EMPTY: Segment = Segment(libc::iovec {
        iov_base: core::ptr::null_mut(),
        iov_len: 0,
    });

    /// A segment over `len` bytes at `base`; the caller has checked that they lie in one mapping
    /// that outlives the segment.
    #[inline]
    pub(crate) fn new(base: *mut u8, len: usize) -> Segment {
        Segment(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The segment without its first `bytes` (all of it when there are fewer).
    #[inline]
    #[must_use]
    pub fn skip(self, bytes: usize) -> Segment {
        let bytes = bytes.min(self.len());
        Segment::new(self.base().wrapping_add(bytes), self.len() - bytes)
    }

    /// The first `bytes` of the segment (all of it when there are fewer).
    #[inline]
    #[must_use]
    pub fn take(self, bytes: usize) -> Segment {
        Segment::new(self.base(), self.len().min(bytes))
    }

    /// Whether the start address is a multiple of `align` (for O_DIRECT).
    #[inline]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.base().addr().is_multiple_of(align)
    }

    /// Start address in this process.
    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }
}

impl core::fmt::Debug for Segment {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Segment({:p}+{})", self.0.iov_base, self.0.iov_len)
    }
}

/// A list of segments with a capacity fixed at creation: `push` never allocates.
#[derive(Debug)]
pub struct Segments {
    list: Vec<Segment>,
    capacity: usize,
}

impl Segments {
    /// A list for at most `capacity` segments.
    pub fn with_capacity(capacity: usize) -> Segments {
        Segments {
            list: Vec::with_capacity(capacity),
            capacity,
        }
    }

    /// Appends `segment`; `false` when the list is full.
    #[inline]
    #[must_use]
    pub fn push(&mut self, segment: Segment) -> bool {
        if self.list.len() >= self.capacity {
            return false;
        }
        self.list.push(segment);
        true
    }

    /// Appends `segments`, as many as there is [`Segments::room`] for.
    #[inline]
    pub fn extend(&mut self, segments: impl ExactSizeIterator<Item = Segment>) {
        let room = self.room();
        self.list.extend(segments.take(room));
    }

    /// How many more segments there is room for.
    #[inline]
    pub fn room(&self) -> usize {
        self.capacity - self.list.len()
    }

    /// Number of segments.
    #[inline]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Forgets all segments from index `len` on.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
    }

    /// Forgets all segments.
    #[inline]
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// Forgets the first `count` segments; the others move to the front.
    pub fn drop_front(&mut self, count: usize) {
        self.list.drain(..count.min(self.list.len()));
    }

    /// The segments as a slice.
    #[inline]
    pub fn as_slice(&self) -> &[Segment] {
        &self.list
    }

    /// The segments as a mutable slice, so that a header can be skipped in place.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [Segment] {
        &mut self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_list_refuses_and_keeps_its_content() {
        let mut list = Segments::with_capacity(1);
        assert!(list.push(Segment::EMPTY));
        assert!(!list.push(Segment::EMPTY));
        assert_eq!(list.len(), 1);
    }

    #[test]
    fn skip_and_take_never_leave_the_segment() {
        let mut bytes = [0u8; 8];
        let segment = Segment::new(bytes.as_mut_ptr(), 8);
        assert_eq!(segment.skip(3).len(), 5);
        assert_eq!(segment.skip(9).len(), 0);
        assert_eq!(segment.take(9).len(), 8);
        assert_eq!(segment.skip(8).base(), segment.base().wrapping_add(8));
    }
}
