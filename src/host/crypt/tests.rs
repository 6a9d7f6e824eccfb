//! What is on the disk is what the standard says, however buffers are cut and operations end.

use std::sync::Arc;

use super::*;
use crate::memory::{Access, GuestRam, Segments};
use crate::sys::xts::standard::reference;
use crate::testing::disk::{Ending, TestDisk};

const KEY: [u8; 64] = {
    let mut key = [0; 64];
    let mut at = 0;
    while at < 64 {
        key[at] = (at * 11 + 3) as u8;
        at += 1;
    }
    key
};
const DISK: usize = 4 << 20;
const RAM: u64 = 8 << 20;

struct Rig {
    ram: Arc<GuestRam>,
    crypt: Crypt,
    disk: TestDisk,
    sector: usize,
    seed: u32,
}

fn token(slot: u16) -> Token {
    Token {
        slot,
        generation: 0x1234,
    }
}

impl Rig {
    fn new(sector: u32, in_flight: u16) -> Rig {
        Rig {
            ram: GuestRam::for_test(&[(0, RAM)]),
            crypt: Crypt::new(&DiskKey::for_test(&KEY), sector, in_flight).unwrap(),
            disk: TestDisk::new(DISK),
            sector: sector as usize,
            seed: 1,
        }
    }

    /// Segments of these lengths, one after the other from `at` on, with gaps of `gap`.
    fn cut(&self, at: u64, lens: &[usize], gap: u64) -> Segments {
        let mut list = Segments::with_capacity(lens.len());
        let mut at = at;
        for &len in lens {
            let len = u32::try_from(len).unwrap();
            self.ram
                .translate(at, len, Access::Write, &mut list)
                .unwrap();
            at += u64::from(len) + gap;
        }
        list
    }

    fn random(&mut self, bytes: usize) -> Vec<u8> {
        let next = |seed: &mut u32| {
            *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*seed >> 24) as u8
        };
        (0..bytes).map(|_| next(&mut self.seed)).collect()
    }

    /// Submits, completes and reaps until the disk has nothing more.
    fn run(&mut self, slot: u16, op: BlkOp<'_>) -> Result<u32, i32> {
        self.crypt
            .over(&mut self.disk)
            .submit(token(slot), op)
            .unwrap();
        self.finish(slot)
    }

    fn finish(&mut self, slot: u16) -> Result<u32, i32> {
        for _ in 0..10_000 {
            self.disk.release();
            if let Some(done) = self.crypt.over(&mut self.disk).reap() {
                assert_eq!(done.token, token(slot));
                assert_eq!(self.crypt.slots[usize::from(slot)].count, 0);
                return done.result;
            }
        }
        panic!("it never completes");
    }

    fn all_pieces_are_free(&self) {
        let mut free = self.crypt.free.clone();
        free.sort_unstable();
        let all: Vec<u16> = (0..self.crypt.slots.len()).map(|i| i as u16).collect();
        assert_eq!(free, all);
    }

    /// What the disk holds, decrypted by the standard's letter.
    fn plain(&self, at: usize, bytes: usize) -> Vec<u8> {
        let on_disk = &self.disk.bytes[at..at + bytes];
        reference(&KEY, self.sector, at as u64, on_disk, false)
    }
}

/// Ways to cut `bytes` bytes.
fn cuts(bytes: usize) -> Vec<Vec<usize>> {
    let every = |len: usize| {
        let mut cut = vec![len; bytes / len];
        cut.push(bytes % len);
        cut
    };
    vec![
        vec![bytes],
        vec![1, bytes - 1],
        vec![bytes - 1, 1],
        vec![bytes / 2 + 7, 0, bytes - bytes / 2 - 7],
        every(512),
        every(511),
        every(100),
        every(4096),
        every(1000),
    ]
}

#[test]
fn any_cut_of_a_guests_buffers_is_the_standards_ciphertext() {
    for sector in [512u32, 4096] {
        let mut rig = Rig::new(sector, 64);
        for bytes in [4096, 20480, 3 * PIECE_BYTES + 4096] {
            for (number, lens) in cuts(bytes).into_iter().enumerate() {
                let at = 4096 * (number + 1);
                let data = rig.random(bytes);
                let from = rig.cut(13, &lens, 5);
                copy::write(from.as_slice(), 0, &data);
                let write = BlkOp::Write {
                    offset: at as u64,
                    segments: from.as_slice(),
                    durable: number % 2 == 1,
                };
                let what = format!("sectors of {sector}, {bytes} bytes, cut {number}");
                assert_eq!(rig.run(5, write), Ok(bytes as u32), "{what}");
                assert!(rig.plain(at, bytes) == data, "{what}");
                assert!(rig.disk.bytes[at..at + bytes] != data, "{what}");
                let mut there = vec![0; bytes];
                copy::read(from.as_slice(), 0, &mut there);
                assert!(there == data, "{what}: a write changes the guest's memory");
                // Back through another cut.
                let other = cuts(bytes).swap_remove((number + 4) % 9);
                let to = rig.cut(RAM / 2 + 1, &other, 3);
                let read = BlkOp::Read {
                    offset: at as u64,
                    segments: to.as_slice(),
                };
                assert_eq!(rig.run(63, read), Ok(bytes as u32), "{what}");
                let mut back = vec![0; bytes];
                copy::read(to.as_slice(), 0, &mut back);
                assert!(back == data, "{what}");
            }
        }
        assert!(rig.disk.durable_writes > 0);
        rig.all_pieces_are_free();
    }
}

#[test]
fn short_io_is_told_in_whole_sectors_and_less_than_one_is_carried_on() {
    let bytes = 2 * PIECE_BYTES + 8192;
    for sector in [512u32, 4096] {
        let cases = [
            (vec![Ending::Short(4096)], 4096),
            (
                vec![Ending::Short(PIECE_BYTES as u32 + 4097)],
                PIECE_BYTES + 4096,
            ),
            (vec![Ending::Short(8191)], 8192 - sector as usize),
            (vec![Ending::Short(100), Ending::Whole], bytes),
            (
                vec![Ending::Short(1), Ending::Short(510), Ending::Short(4086)],
                4096,
            ),
            (vec![Ending::Short(0)], 0),
            (vec![Ending::Short(3), Ending::Short(0)], 0),
        ];
        for (endings, want) in cases {
            let mut rig = Rig::new(sector, 8);
            let data = rig.random(bytes);
            let list = rig.cut(1, &[777, bytes - 777], 9);
            copy::write(list.as_slice(), 0, &data);
            let segments = list.as_slice();
            rig.disk.endings = endings.clone().into();
            let write = |durable| BlkOp::Write {
                offset: 4096,
                segments,
                durable,
            };
            let what = format!("{sector} {endings:?}");
            assert_eq!(rig.run(0, write(true)), Ok(want as u32), "write {what}");
            assert!(rig.plain(4096, want) == data[..want], "{what}");
            assert_eq!(rig.run(0, write(true)), Ok(bytes as u32));
            assert!(rig.plain(4096, bytes) == data);
            copy::zero(segments, 0, bytes);
            rig.disk.endings = endings.into();
            let read = BlkOp::Read {
                offset: 4096,
                segments,
            };
            assert_eq!(rig.run(0, read), Ok(want as u32), "read {what}");
            let mut back = vec![0; bytes];
            copy::read(segments, 0, &mut back);
            assert!(back[..want] == data[..want], "read {what}");
            assert!(back[want..].iter().all(|byte| *byte == 0), "read {what}");
            rig.all_pieces_are_free();
        }
    }
}

#[test]
fn errors_and_a_full_disk_leave_no_piece_behind() {
    let mut rig = Rig::new(512, 4);
    let list = rig.cut(0, &[8192], 0);
    let segments = list.as_slice();
    let read = BlkOp::Read {
        offset: 0,
        segments,
    };
    let write = BlkOp::Write {
        offset: 0,
        segments,
        durable: false,
    };
    for op in [read, write] {
        rig.disk.endings = [Ending::Error(5)].into();
        assert_eq!(rig.run(3, op), Err(5));
        rig.disk.endings = [Ending::Short(9), Ending::Error(28)].into();
        assert_eq!(rig.run(3, op), Err(28));
        rig.all_pieces_are_free();
        rig.disk.room = 0;
        assert_eq!(
            rig.crypt.over(&mut rig.disk).submit(token(0), op),
            Err(Full)
        );
        rig.all_pieces_are_free();
        // What is less than a sector finds no room for its rest.
        rig.disk.room = 1;
        rig.disk.endings = [Ending::Short(9)].into();
        rig.crypt.over(&mut rig.disk).submit(token(1), op).unwrap();
        rig.disk.release();
        rig.disk.room = 0;
        assert_eq!(rig.finish(1), Err(EAGAIN));
        rig.all_pieces_are_free();
        rig.disk.room = usize::MAX;
    }
}

#[test]
fn operations_share_the_pieces_there_are() {
    let mut rig = Rig::new(512, 3);
    let bytes = 2 * PIECE_BYTES;
    let data = rig.random(bytes);
    let list = rig.cut(0, &[bytes], 0);
    copy::write(list.as_slice(), 0, &data);
    let at = |offset: usize| BlkOp::Write {
        offset: offset as u64,
        segments: list.as_slice(),
        durable: false,
    };
    let mut disk = rig.crypt.over(&mut rig.disk);
    disk.submit(token(0), at(0)).unwrap();
    disk.submit(token(1), at(1 << 20)).unwrap();
    assert_eq!(disk.submit(token(2), at(2 << 20)), Err(Full));
    assert_eq!(disk.in_flight(), 2);
    rig.disk.release();
    // The last comes first, and had one piece only.
    let mut disk = rig.crypt.over(&mut rig.disk);
    let first = disk.reap().unwrap();
    assert_eq!(
        (first.token, first.result),
        (token(1), Ok(PIECE_BYTES as u32))
    );
    let second = disk.reap().unwrap();
    assert_eq!((second.token, second.result), (token(0), Ok(bytes as u32)));
    assert!(rig.plain(0, bytes) == data);
    assert!(rig.plain(1 << 20, PIECE_BYTES) == data[..PIECE_BYTES]);
    rig.all_pieces_are_free();
    let mut rig = Rig::new(512, 64);
    let most = PIECES_PER_OP * PIECE_BYTES;
    let list = rig.cut(0, &[most + 512], 0);
    let write = BlkOp::Write {
        offset: 0,
        segments: list.as_slice(),
        durable: false,
    };
    assert_eq!(rig.run(0, write), Ok(most as u32));
}

#[test]
fn zeros_are_written_as_ciphertext_and_the_rest_goes_through() {
    for sector in [512u32, 4096] {
        let mut rig = Rig::new(sector, 8);
        let garbage = rig.random(DISK);
        rig.disk.bytes.copy_from_slice(&garbage);
        let zeroes = |bytes| BlkOp::WriteZeroes {
            offset: 8192,
            bytes,
            unmap: true,
        };
        assert_eq!(rig.run(2, zeroes(73728)), Ok(73728));
        assert!(rig.plain(8192, 73728) == vec![0; 73728]);
        assert!(rig.disk.bytes[..8192] == garbage[..8192]);
        assert!(rig.disk.bytes[81920..] == garbage[81920..]);
        assert_eq!(rig.run(2, zeroes(1 << 20)), Ok(8 * PIECE_BYTES as u32));
        assert_eq!((rig.disk.unmaps, rig.disk.durable_writes), (0, 0));
        let discard = BlkOp::Discard {
            offset: 4096,
            bytes: 65536,
        };
        assert_eq!(rig.run(1, discard), Ok(65536));
        assert_eq!(rig.disk.discards, [(4096, 65536)]);
        assert_eq!(rig.run(1, BlkOp::Flush), Ok(0));
        assert_eq!(rig.disk.flushes, 1);
        let nothing = BlkOp::Read {
            offset: 0,
            segments: &[],
        };
        assert_eq!(rig.run(1, nothing), Ok(0));
        rig.all_pieces_are_free();
    }
}

#[test]
fn a_buffer_posted_twice_spoils_itself_and_nothing_else() {
    let mut rig = Rig::new(512, 8);
    let data = rig.random(8192);
    rig.disk.bytes[..8192].copy_from_slice(&reference(&KEY, 512, 0, &data, true));
    let guard = rig.cut(0, &[16384], 0);
    copy::write(guard.as_slice(), 0, &[0xee; 16384]);
    let one = rig.cut(4000, &[4096], 0).as_slice()[0];
    let twice = [one.take(1000), one, one.take(3096)];
    let read = BlkOp::Read {
        offset: 0,
        segments: &twice,
    };
    assert_eq!(rig.run(0, read), Ok(8192));
    let mut all = vec![0; 16384];
    copy::read(guard.as_slice(), 0, &mut all);
    assert!(
        all[..4000]
            .iter()
            .chain(&all[8096..])
            .all(|byte| *byte == 0xee)
    );
    assert!(all[4000..4000 + 3096] == data[5096..]);
}
