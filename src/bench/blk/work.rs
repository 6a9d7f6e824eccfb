//! Which request comes next.

use super::Kind;
use super::stamp::mix;
use crate::config::{Rw, RwKind};

/// The requests of one queue, in units of blocks.
#[derive(Debug)]
pub(super) struct Work {
    rw: Rw,
    read_percent: u8,
    /// Blocks first to first + blocks - 1 of the disk.
    first: u64,
    blocks: u64,
    cursor: u64,
    random: u64,
    left: u64,
}

impl Work {
    /// `left` requests over `blocks` blocks from `first` on; one block at least.
    pub(super) fn new(rw: Rw, read_percent: u8, first: u64, blocks: u64, left: u64) -> Work {
        Work {
            rw,
            read_percent,
            first,
            blocks,
            cursor: 0,
            random: 0,
            left,
        }
    }

    /// The same with random numbers of its own.
    pub(super) fn seeded(self, seed: u64) -> Work {
        Work {
            random: seed,
            ..self
        }
    }

    /// The first block of the range.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// The next request, and the block that it is for.
    #[inline]
    pub(super) fn next(&mut self) -> Option<(Kind, u64)> {
        self.left = self.left.checked_sub(1)?;
        let kind = match self.rw.kind {
            RwKind::Read => Kind::Read,
            RwKind::Write => Kind::Write,
            RwKind::Trim => Kind::Trim,
            RwKind::Mixed => self.mixed(),
        };
        let block = if self.rw.random {
            self.below(self.blocks)
        } else {
            let block = self.cursor;
            self.cursor += 1;
            if self.cursor == self.blocks {
                self.cursor = 0;
            }
            block
        };
        Some((kind, self.first + block))
    }

    fn mixed(&mut self) -> Kind {
        if self.below(100) < u64::from(self.read_percent) {
            Kind::Read
        } else {
            Kind::Write
        }
    }

    /// A random number below `bound`.
    #[inline]
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(mix(&mut self.random)) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(kind: RwKind, random: bool, left: u64) -> Work {
        Work::new(Rw { kind, random }, 70, 100, 10, left).seeded(5)
    }

    #[test]
    fn in_sequence_every_block_comes_round() {
        let mut work = work(RwKind::Write, false, 25);
        for index in 0..25 {
            assert_eq!(work.next(), Some((Kind::Write, 100 + index % 10)));
        }
        assert_eq!(work.next(), None);
    }

    #[test]
    fn at_random_every_block_is_as_likely() {
        let mut work = work(RwKind::Read, true, 10_000);
        let mut counts = [0u32; 10];
        while let Some((kind, block)) = work.next() {
            assert_eq!(kind, Kind::Read);
            counts[usize::try_from(block - 100).unwrap()] += 1;
        }
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
    }

    #[test]
    fn a_mix_has_its_share_of_reads() {
        let mut work = work(RwKind::Mixed, true, 10_000);
        let mut reads = 0;
        while let Some((kind, _)) = work.next() {
            reads += u32::from(kind == Kind::Read);
        }
        assert!((6800..7200).contains(&reads), "{reads}");
    }

    #[test]
    fn two_seeds_are_two_sequences() {
        let blocks = |seed| {
            let mut work = work(RwKind::Read, true, 50).seeded(seed);
            std::iter::from_fn(|| work.next()).collect::<Vec<_>>()
        };
        assert_eq!(blocks(1), blocks(1));
        assert_ne!(blocks(1), blocks(2));
    }
}
