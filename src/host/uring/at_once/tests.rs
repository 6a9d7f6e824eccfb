//! A file in memory, beside one that is not.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::host::blk::BlkIo;
use crate::host::uring::UringDisk;
use crate::memory::{Access, GuestRam, Segments, copy};
use crate::sys::disk::{DiskFile, DiskOptions};
use crate::sys::uring::Uring;

const MIB: usize = 1 << 20;
/// Usually tmpfs.
const MEMORY: &str = "/dev/shm";
/// Usually ext4 or the like.
const CACHE: &str = "/var/tmp";

struct Rig {
    ram: Arc<GuestRam>,
    file: TempFile,
    ring: Uring,
    disk: UringDisk,
    in_memory: bool,
}

impl Rig {
    fn new(directory: &str) -> Rig {
        let file = TempFile::new_in(Path::new(directory)).unwrap();
        std::fs::write(file.as_path(), vec![0x5a; 4 * MIB]).unwrap();
        let options = DiskOptions {
            read_only: false,
            direct: Some(false),
            block_size: 512,
            lock: false,
        };
        let disk = Arc::new(DiskFile::open(file.as_path(), options).unwrap());
        let in_memory = disk.is_in_memory();
        let (mut ring, mut disk) = (Uring::new().unwrap(), UringDisk::new(disk));
        disk.attach(&mut ring, 512).unwrap();
        Rig {
            ram: GuestRam::for_test(&[(0, 8 * MIB as u64)]),
            file,
            ring,
            disk,
            in_memory,
        }
    }

    fn segments(&self, at: usize, len: usize) -> Segments {
        let mut list = Segments::with_capacity(1);
        let (at, len) = (at as u64, u32::try_from(len).unwrap());
        self.ram
            .translate(at, len, Access::Write, &mut list)
            .unwrap();
        list
    }

    /// Submits operations in one turn; returns how many are done before the ring was entered.
    fn submit(&mut self, ops: &[BlkOp<'_>]) -> usize {
        let mut disk = self.disk.lend(&mut self.ring);
        for (slot, op) in (0..).zip(ops) {
            let generation = 7;
            disk.submit(Token { slot, generation }, *op).unwrap();
        }
        assert_eq!(disk.in_flight(), ops.len());
        self.disk.at_once.in_flight()
    }

    /// All that was submitted, by slot.
    fn finish(&mut self, count: usize) -> Vec<Result<u32, i32>> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut done = Vec::new();
        while done.len() < count {
            while let Some(completion) = self.disk.lend(&mut self.ring).reap() {
                assert_eq!(completion.token.generation, 7);
                done.push((completion.token.slot, completion.result));
            }
            self.ring.enter();
            assert!(Instant::now() < deadline, "nothing completes");
        }
        assert_eq!(self.disk.lend(&mut self.ring).in_flight(), 0);
        done.sort_by_key(|(slot, _)| *slot);
        done.into_iter().map(|(_, result)| result).collect()
    }
}

fn write(offset: usize, segments: &Segments, durable: bool) -> BlkOp<'_> {
    BlkOp::Write {
        offset: offset as u64,
        segments: segments.as_slice(),
        durable,
    }
}

fn read(offset: usize, segments: &Segments) -> BlkOp<'_> {
    BlkOp::Read {
        offset: offset as u64,
        segments: segments.as_slice(),
    }
}

fn bytes_in(segments: &Segments) -> Vec<u8> {
    let bytes = segments.as_slice().iter().map(Segment::len).sum();
    let mut out = vec![0; bytes];
    copy::read(segments.as_slice(), 0, &mut out);
    out
}

#[test]
fn a_file_in_memory_needs_no_ring() {
    let mut rig = Rig::new(MEMORY);
    assert!(rig.in_memory, "{MEMORY} is no tmpfs");
    let out = rig.segments(1, 12288);
    copy::write(out.as_slice(), 0, &[0x77; 12288]);
    let back = rig.segments(MIB + 3, 16384);
    let ops = [
        write(8192, &out, false),
        write(24576, &out, true),
        BlkOp::Flush,
        read(8192, &back),
    ];
    assert_eq!(rig.submit(&ops), 4);
    assert!(rig.disk.has_done());
    assert_eq!(rig.finish(4), [Ok(12288), Ok(12288), Ok(0), Ok(16384)]);
    assert!(!rig.disk.has_done());
    let mut want = vec![0x77; 12288];
    want.extend([0x5a; 4096]);
    assert!(bytes_in(&back) == want, "other bytes were read");
    let file = std::fs::read(rig.file.as_path()).unwrap();
    assert!(file[24576..36864].iter().all(|&byte| byte == 0x77));
    assert_eq!((file[24575], file[36864]), (0x5a, 0x5a));
    assert_eq!(rig.disk.at_once(), 4);
}

#[test]
fn a_turn_copies_no_more_than_its_share_and_the_ring_the_rest() {
    let mut rig = Rig::new(MEMORY);
    let out = rig.segments(0, 4 * MIB);
    let data: Vec<u8> = (0..4 * MIB)
        .map(|at| u8::try_from((at / 512) % 251).unwrap())
        .collect();
    copy::write(out.as_slice(), 0, &data);
    let half = |number: usize| rig.segments(number * MIB / 2, MIB / 2);
    let halves: Vec<Segments> = (0..8).map(half).collect();
    let ops: Vec<BlkOp<'_>> = (0..8)
        .zip(&halves)
        .map(|(number, half)| write(number * MIB / 2, half, false))
        .collect();
    assert_eq!(rig.submit(&ops), BYTES_PER_TURN / (MIB / 2));
    assert_eq!(rig.finish(8), [Ok(u32::try_from(MIB / 2).unwrap()); 8]);
    let file = std::fs::read(rig.file.as_path()).unwrap();
    assert!(file == data, "other bytes were written");
    assert_eq!(rig.submit(&ops[..1]), 1, "the next turn has its own share");
    rig.finish(1);
}

#[test]
fn what_is_not_in_memory_goes_through_the_ring() {
    let mut rig = Rig::new(CACHE);
    if rig.in_memory {
        return;
    }
    let out = rig.segments(0, 4096);
    copy::write(out.as_slice(), 0, &[0x33; 4096]);
    let back = rig.segments(8192, 4096);
    let ops = [write(4096, &out, true), BlkOp::Flush, read(0, &back)];
    assert_eq!(rig.submit(&ops), 0);
    assert!(!rig.disk.has_done());
    assert_eq!(rig.finish(3), [Ok(4096), Ok(0), Ok(4096)]);
    assert!(bytes_in(&back).iter().all(|&byte| byte == 0x5a));
    let file = std::fs::read(rig.file.as_path()).unwrap();
    assert!(file[4096..8192].iter().all(|&byte| byte == 0x33));
    assert_eq!(rig.disk.at_once(), 0);
}

#[test]
fn a_file_that_was_cut_ends_where_it_ends() {
    for directory in [MEMORY, CACHE] {
        let mut rig = Rig::new(directory);
        rig.file.as_file().set_len(12288).unwrap();
        let back = rig.segments(0, 16384);
        rig.submit(&[read(4096, &back), read(12288, &back)]);
        assert_eq!(rig.finish(2), [Ok(8192), Ok(0)], "{directory}");
    }
}

/// What is copied while a page is missing is to be done again, and the kernel does it.
#[test]
fn a_file_that_is_cut_while_it_is_mapped_is_asked_of_the_kernel() {
    let mut rig = Rig::new(MEMORY);
    assert!(rig.in_memory, "{MEMORY} is no tmpfs");
    let (back, end) = (rig.segments(0, 16384), rig.segments(32768, 16384));
    let out = rig.segments(MIB + 1, 8192);
    copy::write(out.as_slice(), 0, &[0x77; 8192]);
    // Known and mapped from now on.
    rig.submit(&[read(0, &back), read(12288, &end)]);
    assert_eq!(rig.finish(2), [Ok(16384); 2]);
    rig.file.as_file().set_len(16384).unwrap();
    let ops = [read(0, &back), read(12288, &end), write(8192, &out, false)];
    rig.submit(&ops);
    // The first was there as a whole, before anybody knew.
    assert_eq!(rig.finish(3), [Ok(16384), Err(EAGAIN), Err(EAGAIN)]);
    assert!(bytes_in(&back).iter().all(|&byte| byte == 0x5a));
    rig.submit(&ops[1..]);
    assert_eq!(rig.finish(2), [Ok(4096), Ok(8192)]);
    let file = std::fs::read(rig.file.as_path()).unwrap();
    assert_eq!(file.len(), 16384);
    assert!(file[..8192].iter().all(|&byte| byte == 0x5a));
    assert!(file[8192..].iter().all(|&byte| byte == 0x77));
}
