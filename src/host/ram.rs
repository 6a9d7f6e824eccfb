//! `RamDisk`: a disk in the daemon's memory, lost when the daemon ends.

use std::sync::Arc;

use crate::memory::{Segment, Store};

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};
use super::copies::{Copies, moved};

/// One queue's access to a disk in memory.
#[derive(Debug)]
pub struct RamDisk {
    store: Arc<Store>,
    copies: Copies,
}

impl RamDisk {
    /// Access to `store` with at most `in_flight` operations between two reaps.
    pub fn new(store: Arc<Store>, in_flight: usize) -> RamDisk {
        RamDisk {
            copies: Copies::new(in_flight),
            store,
        }
    }

    /// Lets others see what was written; before the driver is told.
    #[inline]
    pub fn settle(&mut self) {
        self.copies.settle();
    }

    fn stored(&self, offset: u64, segments: &[Segment]) -> Segment {
        let len = segments.iter().map(Segment::len).sum();
        self.store.segment(offset, len)
    }
}

impl BlkIo for RamDisk {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let zeroed = match op {
            BlkOp::Read { offset, segments } => {
                let stored = self.stored(offset, segments);
                self.copies.read(token, stored, segments);
                return Ok(());
            }
            BlkOp::Write {
                offset, segments, ..
            } => {
                let stored = self.stored(offset, segments);
                let disk_bytes = self.store.bytes() as u64;
                self.copies.write(token, stored, segments, disk_bytes);
                return Ok(());
            }
            BlkOp::Flush => 0,
            BlkOp::Discard { offset, bytes } => self.store.zero(offset, bytes as usize, true),
            BlkOp::WriteZeroes {
                offset,
                bytes,
                unmap,
            } => self.store.zero(offset, bytes as usize, unmap),
        };
        self.copies.done(token, moved(zeroed));
        Ok(())
    }

    #[inline]
    fn reap(&mut self) -> Option<Completion> {
        self.copies.reap().map(|(completion, _)| completion)
    }

    fn in_flight(&self) -> usize {
        self.copies.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::super::copies::CACHED_MAX;
    use super::*;
    use crate::memory::{Access, GuestRam, Segments, copy};

    const BLOCK: usize = 4096;
    const BLOCK_BYTES: u32 = 4096;

    fn token(slot: u16) -> Token {
        Token {
            slot,
            generation: 0,
        }
    }

    /// Writes and reads of one burst, in order, whatever the disk is written with: a read sees the
    /// write before it, also before anybody else would.
    #[test]
    fn a_burst_reads_what_it_wrote_on_small_and_large_disks() {
        for bytes in [1 << 20, CACHED_MAX + (1 << 20)] {
            let store = Arc::new(Store::new(bytes).unwrap());
            let mut disk = RamDisk::new(Arc::clone(&store), 64);
            let ram = GuestRam::for_test(&[(0, 0x10_0000)]);
            let segment = |at: u64| {
                let mut out = Segments::with_capacity(1);
                ram.translate(at, BLOCK_BYTES, Access::Write, &mut out)
                    .unwrap();
                out.as_slice()[0]
            };
            let block = |number: u64| -> Vec<u8> {
                (0..BLOCK as u64)
                    .map(|at| (at * 7 + number * 31).to_le_bytes()[0])
                    .collect()
            };
            // Sectors of 512 bytes: the place of a block need not be one of a page.
            let place = |number: u64| 512 + number * 2 * BLOCK as u64;
            for number in 0..16 {
                let (out, back) = (
                    segment(number * 8192 + 1),
                    segment(0x8_0000 + number * 8192),
                );
                copy::write(&[out], 0, &block(number));
                let (offset, durable) = (place(number), false);
                let segments = &[out][..];
                let op = BlkOp::Write {
                    offset,
                    segments,
                    durable,
                };
                disk.submit(token(0), op).unwrap();
                let segments = &[back][..];
                disk.submit(token(1), BlkOp::Read { offset, segments })
                    .unwrap();
            }
            while let Some(done) = disk.reap() {
                assert_eq!(done.result, Ok(BLOCK_BYTES));
            }
            assert_eq!(disk.copies.is_unsettled(), bytes > CACHED_MAX);
            disk.settle();
            assert!(!disk.copies.is_unsettled());
            for number in 0..16 {
                let mut got = vec![0; BLOCK];
                copy::read(&[segment(0x8_0000 + number * 8192)], 0, &mut got);
                assert!(got == block(number), "{number} read, disk of {bytes}");
                copy::read(&[store.segment(place(number), BLOCK)], 0, &mut got);
                assert!(got == block(number), "{number} stored, disk of {bytes}");
            }
        }
    }
}
