//! Which blocks were written how often, and which are in flight: no block is twice, so that what a
//! read has to bring is known.

use super::stamp::{self, Expected, Mismatch, Stamp};
use crate::memory::{Segment, copy};

/// Verification of one queue's range.
#[derive(Debug)]
pub(super) struct Verify {
    /// Blocks first to first + written.len() - 1 of the disk.
    first: u64,
    /// Writes of each block by this run.
    written: Box<[u32]>,
    in_flight: Box<[bool]>,
    block_bytes: u32,
    seed: u64,
    /// Blocks that this run did not write are to have a stamp, with this seed if any.
    others: Option<Option<u64>>,
    /// A block outside the back-end's reach.
    scratch: Box<[u8]>,
    /// Blocks that were checked.
    pub checked: u64,
}

impl Verify {
    /// For the blocks `first` to `first + blocks - 1`.
    pub(super) fn new(
        first: u64,
        blocks: usize,
        block_bytes: u32,
        seed: u64,
        others: Option<Option<u64>>,
    ) -> Verify {
        Verify {
            first,
            written: vec![0; blocks].into(),
            in_flight: vec![false; blocks].into(),
            block_bytes,
            seed,
            others,
            scratch: vec![0; block_bytes as usize].into(),
            checked: 0,
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "below the table's length")]
    fn index(&self, block: u64) -> usize {
        (block - self.first) as usize
    }

    /// Takes `block`, or the next that is not in flight. There has to be one.
    pub(super) fn claim(&mut self, block: u64) -> u64 {
        let mut index = self.index(block);
        while self.in_flight[index] {
            index += 1;
            if index == self.in_flight.len() {
                index = 0;
            }
        }
        self.in_flight[index] = true;
        self.first + index as u64
    }

    /// The request for `block` is done.
    pub(super) fn release(&mut self, block: u64) {
        let index = self.index(block);
        self.in_flight[index] = false;
    }

    /// Puts into `data` what the next write of `block` writes.
    pub(super) fn stamp(&mut self, block: u64, data: Segment) {
        let index = self.index(block);
        self.written[index] += 1;
        let stamp = Stamp {
            offset: block * u64::from(self.block_bytes),
            generation: u64::from(self.written[index]),
            seed: self.seed,
        };
        stamp::write(&mut self.scratch, &stamp);
        copy::write(&[data], 0, &self.scratch);
    }

    /// Checks what was read from `block`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(&mut self, block: u64, data: Segment) -> Result<(), Mismatch> {
        let offset = block * u64::from(self.block_bytes);
        let expected = match (self.written[self.index(block)], self.others) {
            (0, None) => return Ok(()),
            (0, Some(seed)) => Expected {
                offset,
                generation: None,
                seed,
            },
            (generation, _) => Expected {
                offset,
                generation: Some(u64::from(generation)),
                seed: Some(self.seed),
            },
        };
        copy::read(&[data], 0, &mut self.scratch);
        self.checked += 1;
        stamp::check(&self.scratch, &expected)
    }

    /// The first block from `block` on that this run has written.
    pub(super) fn written_from(&self, block: u64) -> Option<u64> {
        let from = self.index(block);
        let rest = self.written.get(from..)?;
        let ahead = rest.iter().position(|writes| *writes > 0)?;
        Some(block + ahead as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    const BASE: u64 = 4096;

    fn data(ram: &GuestRam) -> Segment {
        ram.finder()(BASE, 512).unwrap()
    }

    #[test]
    fn no_block_is_taken_twice() {
        let mut verify = Verify::new(10, 4, 512, 1, None);
        let taken = [12, 12, 12, 12].map(|block| verify.claim(block));
        assert_eq!(taken, [12, 13, 10, 11]);
        verify.release(10);
        assert_eq!(verify.claim(13), 10);
    }

    #[test]
    fn a_block_has_to_be_the_last_write_of_it() {
        let ram = GuestRam::for_test(&[(0, 1 << 20)]);
        let mut verify = Verify::new(10, 4, 512, 1, None);
        verify.stamp(11, data(&ram));
        verify.check(11, data(&ram)).unwrap();
        // The block was written again, and the first write is still there.
        let mut old = [0; 512];
        copy::read(&[data(&ram)], 0, &mut old);
        verify.stamp(11, data(&ram));
        verify.check(11, data(&ram)).unwrap();
        copy::write(&[data(&ram)], 0, &old);
        let says = verify.check(11, data(&ram)).unwrap_err().to_string();
        assert_eq!(says, "offset 5632: expected generation 0x2, got 0x1");
        assert_eq!(verify.checked, 3);
    }

    #[test]
    fn blocks_of_others_are_checked_when_only_reading() {
        let ram = GuestRam::for_test(&[(0, 1 << 20)]);
        Verify::new(10, 4, 512, 1, None).stamp(11, data(&ram));
        let check = |others, block| {
            let mut verify = Verify::new(10, 4, 512, 2, others);
            verify.check(block, data(&ram))
        };
        check(Some(None), 11).unwrap();
        check(Some(Some(1)), 11).unwrap();
        assert!(check(Some(Some(2)), 11).is_err());
        assert!(check(Some(None), 12).is_err());
        check(None, 12).unwrap();
    }

    #[test]
    fn what_was_written_is_found_again() {
        let ram = GuestRam::for_test(&[(0, 1 << 20)]);
        let mut verify = Verify::new(10, 4, 512, 1, None);
        assert_eq!(verify.written_from(10), None);
        verify.stamp(12, data(&ram));
        assert_eq!(verify.written_from(10), Some(12));
        assert_eq!(verify.written_from(13), None);
        assert_eq!(verify.written_from(14), None);
    }
}
