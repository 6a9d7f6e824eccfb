//! `Bounce`: a buffer of our own that is reached like guest memory.
//!
//! A system call that fills a guest's buffers takes one list of segments. Where the guest's do not
//! suffice, the rest of the list is a bounce buffer, whose bytes [`super::copy`] moves on later.

use core::cell::UnsafeCell;

use super::Segment;

/// Bytes of ours with a fixed address.
#[derive(Debug)]
pub struct Bounce {
    bytes: Box<[UnsafeCell<u8>]>,
}

impl Bounce {
    /// A buffer of `len` bytes, all zero.
    pub fn new(len: usize) -> Bounce {
        Bounce {
            bytes: (0..len).map(|_| UnsafeCell::new(0)).collect(),
        }
    }

    /// All bytes, as a segment. It stays valid as long as the buffer.
    pub fn segment(&self) -> Segment {
        // The bytes are cells: writing them through a shared borrow of the buffer is allowed.
        Segment::new(self.bytes.as_ptr().cast_mut().cast(), self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::copy;
    use super::*;

    #[test]
    fn bytes_written_through_the_segment_are_read_back() {
        let bounce = Bounce::new(16);
        let segments = [bounce.segment()];
        assert_eq!(copy::write(&segments, 3, b"abc"), 3);
        let mut back = [9; 16];
        assert_eq!(copy::read(&segments, 0, &mut back), 16);
        assert_eq!(&back[..7], b"\0\0\0abc\0");
    }
}
