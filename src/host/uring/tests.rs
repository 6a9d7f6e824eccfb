//! Disks on real files: on a file system with direct I/O where there is one, and in shared memory.

use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::memory::{Access, GuestRam, Segments};
use crate::sys::disk::DiskOptions;

/// Usually ext4 or the like, and usually tmpfs.
const DIRECTORIES: [&str; 2] = ["/var/tmp", "/dev/shm"];
const MIB: u64 = 1 << 20;

struct Rig {
    ram: Arc<GuestRam>,
    file: TempFile,
    ring: Uring,
    disk: UringDisk,
    direct: bool,
}

impl Rig {
    fn new(directory: &str, bytes: u64) -> Rig {
        let file = TempFile::new_in(Path::new(directory)).unwrap();
        file.as_file().set_len(bytes).unwrap();
        let mut ring = Uring::new().unwrap();
        let disk = open(&file);
        let direct = disk.is_direct();
        let mut disk = UringDisk::new(disk);
        disk.attach(&mut ring, 512).unwrap();
        Rig {
            ram: GuestRam::for_test(&[(0, 4 * MIB)]),
            file,
            ring,
            disk,
            direct,
        }
    }

    fn on_disk(&self) -> Vec<u8> {
        std::fs::read(self.file.as_path()).unwrap()
    }

    fn segments(&self, parts: &[(u64, u32)]) -> Segments {
        let mut list = Segments::with_capacity(parts.len());
        for &(at, len) in parts {
            let added = self.ram.translate(at, len, Access::Write, &mut list);
            added.unwrap();
        }
        list
    }

    /// One operation from start to end.
    fn run(&mut self, op: BlkOp<'_>) -> Result<u32, i32> {
        let token = Token {
            slot: 511,
            generation: 0xfedc,
        };
        self.disk.lend(&mut self.ring).submit(token, op).unwrap();
        let completion = finish(&mut self.disk, &mut self.ring);
        assert_eq!(completion.token, token);
        completion.result
    }
}

fn open(file: &TempFile) -> Arc<DiskFile> {
    let options = DiskOptions {
        read_only: false,
        direct: None,
        block_size: 4096,
        lock: false,
    };
    Arc::new(DiskFile::open(file.as_path(), options).unwrap())
}

fn finish(disk: &mut UringDisk, ring: &mut Uring) -> Completion {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        ring.enter();
        if let Some(completion) = disk.lend(ring).reap() {
            return completion;
        }
        assert!(Instant::now() < deadline, "nothing completes");
    }
}

fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 31 + at / 512 + seed) % 251).unwrap();
    (0..bytes).map(byte).collect()
}

fn bytes_in(segments: &Segments, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    assert_eq!(copy::read(segments.as_slice(), 0, &mut out), bytes);
    out
}

/// Compares long contents without printing them.
fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let differs = got.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first byte that differs");
}

#[test]
fn what_is_written_is_on_the_file_and_is_read_back() {
    for directory in DIRECTORIES {
        let mut rig = Rig::new(directory, MIB);
        let out = rig.segments(&[(0, 4096), (65536, 8192)]);
        let data = pattern(12288, 1);
        copy::write(out.as_slice(), 0, &data);
        for durable in [false, true] {
            let write = BlkOp::Write {
                offset: 4096,
                segments: out.as_slice(),
                durable,
            };
            assert_eq!(rig.run(write), Ok(12288), "{directory}");
        }
        assert_eq!(rig.run(BlkOp::Flush), Ok(0), "{directory}");
        let file = rig.on_disk();
        assert_same(&file[4096..16384], &data, directory);
        assert!(file[..4096].iter().chain(&file[16384..]).all(|&b| b == 0));
        let back = rig.segments(&[(MIB, 8192), (2 * MIB, 4096)]);
        let segments = back.as_slice();
        let read = BlkOp::Read {
            offset: 4096,
            segments,
        };
        assert_eq!(rig.run(read), Ok(12288), "{directory}");
        assert_same(&bytes_in(&back, 12288), &data, directory);
        assert_eq!(rig.disk.unaligned(), 0, "{directory}");
    }
}

#[test]
fn unaligned_buffers_move_the_same_bytes_and_leave_their_neighbours() {
    for directory in DIRECTORIES {
        let mut rig = Rig::new(directory, MIB);
        let old = pattern(usize::try_from(MIB).unwrap(), 5);
        std::fs::write(rig.file.as_path(), &old).unwrap();
        // Odd address, odd cuts: whole blocks only in sum.
        let out = rig.segments(&[(1, 4095), (8193, 3), (12301, 4094)]);
        let data = pattern(8192, 2);
        copy::write(out.as_slice(), 0, &data);
        let write = BlkOp::Write {
            offset: 8192,
            segments: out.as_slice(),
            durable: true,
        };
        assert_eq!(rig.run(write), Ok(8192), "{directory}");
        let file = rig.on_disk();
        assert_same(&file[8192..16384], &data, directory);
        assert_same(&file[..8192], &old[..8192], directory);
        assert_same(&file[16384..], &old[16384..], directory);
        let around = rig.segments(&[(MIB, 8193 + 2)]);
        copy::write(around.as_slice(), 0, &[0xee; 8195]);
        let back = rig.segments(&[(MIB + 1, 5), (MIB + 6, 8187)]);
        let segments = back.as_slice();
        let read = BlkOp::Read {
            offset: 8192,
            segments,
        };
        assert_eq!(rig.run(read), Ok(8192), "{directory}");
        assert_same(&bytes_in(&back, 8192), &data, directory);
        let around = bytes_in(&around, 8195);
        assert_eq!((around[0], &around[8193..]), (0xee, &[0xee, 0xee][..]));
        assert_eq!(rig.disk.unaligned(), if rig.direct { 2 } else { 0 });
    }
}

#[test]
fn a_guest_can_not_make_bounce_buffers_grow() {
    let mut rig = Rig::new(DIRECTORIES[0], 2 * MIB);
    assert!(rig.direct, "{} has no direct I/O", DIRECTORIES[0]);
    // One long request is done in part.
    let long = rig.segments(&[(1, 1 << 20)]);
    let bytes = u32::try_from(BOUNCE_BYTES).unwrap();
    let data = pattern(1 << 20, 3);
    copy::write(long.as_slice(), 0, &data);
    let segments = long.as_slice();
    let write = BlkOp::Write {
        offset: 0,
        segments,
        durable: false,
    };
    assert_eq!(rig.run(write), Ok(bytes));
    assert_same(
        &rig.on_disk()[..BOUNCE_BYTES],
        &data[..BOUNCE_BYTES],
        "write",
    );
    assert!(rig.on_disk()[BOUNCE_BYTES..].iter().all(|&b| b == 0));
    // Many at once wait, and find room again when others are done.
    let read = |slot| {
        let token = Token {
            slot,
            generation: 0,
        };
        let offset = 0;
        (token, BlkOp::Read { offset, segments })
    };
    for round in 0..3 {
        for slot in 0..BOUNCES {
            let (token, op) = read(slot);
            let pushed = rig.disk.lend(&mut rig.ring).submit(token, op);
            assert_eq!(pushed, Ok(()), "round {round}, slot {slot}");
        }
        let (token, op) = read(BOUNCES);
        assert_eq!(rig.disk.lend(&mut rig.ring).submit(token, op), Err(Full));
        // Aligned requests and flushes need no buffer.
        let flush = rig.disk.lend(&mut rig.ring).submit(token, BlkOp::Flush);
        assert_eq!(flush, Ok(()));
        for _ in 0..=BOUNCES {
            let completion = finish(&mut rig.disk, &mut rig.ring);
            let moved = if completion.token == token { 0 } else { bytes };
            assert_eq!(completion.result, Ok(moved));
        }
    }
}

#[test]
fn a_file_that_was_cut_gives_short_reads_and_then_none() {
    for directory in DIRECTORIES {
        let mut rig = Rig::new(directory, MIB);
        rig.file.as_file().set_len(12288).unwrap();
        // Aligned and not.
        for at in [65536, 65537] {
            let back = rig.segments(&[(at, 16384)]);
            let segments = back.as_slice();
            let read = |offset| BlkOp::Read { offset, segments };
            assert_eq!(rig.run(read(4096)), Ok(8192), "{directory} at {at}");
            assert_eq!(rig.run(read(12288)), Ok(0), "{directory} at {at}");
        }
    }
}

#[test]
fn two_disks_on_one_ring_get_their_own_completions() {
    let mut rig = Rig::new(DIRECTORIES[0], MIB);
    let other_file = TempFile::new_in(Path::new(DIRECTORIES[1])).unwrap();
    other_file.as_file().set_len(MIB).unwrap();
    let mut other = UringDisk::new(open(&other_file));
    other.attach(&mut rig.ring, 512).unwrap();
    let (ones, twos) = (rig.segments(&[(0, 4096)]), rig.segments(&[(8192, 4096)]));
    copy::write(ones.as_slice(), 0, &[1; 4096]);
    copy::write(twos.as_slice(), 0, &[2; 4096]);
    // The same slots on both disks, so that only the client tells them apart.
    for slot in 0..8 {
        let token = |generation| Token { slot, generation };
        let write = |segments| BlkOp::Write {
            offset: u64::from(slot) * 4096,
            segments,
            durable: false,
        };
        let mut io = rig.disk.lend(&mut rig.ring);
        io.submit(token(1), write(ones.as_slice())).unwrap();
        let mut io = other.lend(&mut rig.ring);
        io.submit(token(2), write(twos.as_slice())).unwrap();
    }
    for _ in 0..8 {
        assert_eq!(finish(&mut rig.disk, &mut rig.ring).token.generation, 1);
        assert_eq!(finish(&mut other, &mut rig.ring).token.generation, 2);
    }
    assert_same(&rig.on_disk()[..32768], &[1; 32768], "ones");
    let other_bytes = std::fs::read(other_file.as_path()).unwrap();
    assert_same(&other_bytes[..32768], &[2; 32768], "twos");
    assert_eq!(rig.disk.lend(&mut rig.ring).in_flight(), 0);
    other.detach(&mut rig.ring);
    rig.disk.detach(&mut rig.ring);
}

#[test]
fn tags_keep_slot_generation_and_buffer_apart() {
    for buffer in [None, Some(0), Some(BOUNCES - 1)] {
        for (slot, generation) in [(0, 0), (511, 0xffff), (0xffff, 1)] {
            let token = Token { slot, generation };
            for kind in Kind::ALL {
                let tag = Tag {
                    token,
                    buffer,
                    kind,
                };
                assert_eq!(Tag::from_u64(tag.to_u64()), tag);
            }
        }
    }
}

/// Does a ranged operation to its end, as the device logic does.
fn zero_all(rig: &mut Rig, offset: u64, bytes: u32, unmap: bool) {
    let (mut done, mut again) = (0, 0);
    while done < bytes {
        let op = BlkOp::WriteZeroes {
            offset: offset + u64::from(done),
            bytes: bytes - done,
            unmap,
        };
        match rig.run(op) {
            Ok(moved) if moved > 0 => done += moved,
            Err(EAGAIN) if again < 2 => again += 1,
            other => panic!("{other:?}"),
        }
    }
}

/// Bytes that the file takes on its disk.
fn allocated(file: &TempFile) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap()) * 512
}

#[test]
fn zeroed_ranges_are_zero_and_their_neighbours_are_not_touched() {
    for directory in DIRECTORIES {
        for [punch, keep] in [[true, true], [true, false], [false, true], [false, false]] {
            for unmap in [false, true] {
                let mut rig = Rig::new(directory, 4 * MIB);
                let mut want = vec![0x77; 4 << 20];
                std::fs::write(rig.file.as_path(), &want).unwrap();
                rig.file.as_file().sync_all().unwrap();
                rig.disk.ranges.punch = punch;
                rig.disk.ranges.keep = keep;
                for (offset, bytes) in [(4096, 4096), (65536, 3 << 20), (4 * MIB - 4096, 4096)] {
                    zero_all(&mut rig, offset, bytes, unmap);
                    let offset = usize::try_from(offset).unwrap();
                    want[offset..offset + bytes as usize].fill(0);
                }
                let what = format!("{directory} punch {punch} keep {keep} unmap {unmap}");
                assert_same(&rig.on_disk(), &want, &what);
                let whole = allocated(&rig.file) >= 4 * MIB;
                assert_eq!(whole, !(unmap && punch), "{what}: allocation");
                rig.disk.detach(&mut rig.ring);
            }
        }
    }
}

#[test]
fn a_discard_gives_space_back_or_does_nothing() {
    for directory in DIRECTORIES {
        for punch in [true, false] {
            let mut rig = Rig::new(directory, 4 * MIB);
            std::fs::write(rig.file.as_path(), vec![0x77; 4 << 20]).unwrap();
            rig.file.as_file().sync_all().unwrap();
            if !punch {
                rig.disk.ranges.discard = Discard::Nothing;
            }
            let op = BlkOp::Discard {
                offset: MIB,
                bytes: 2 << 20,
            };
            assert_eq!(rig.run(op), Ok(2 << 20));
            assert_eq!(allocated(&rig.file) < 4 * MIB, punch, "{directory}");
            let bytes = rig.on_disk();
            assert_same(&bytes[..1 << 20], &[0x77; 1 << 20], "before");
            assert_same(&bytes[3 << 20..], &[0x77; 1 << 20], "behind");
            rig.disk.detach(&mut rig.ring);
        }
    }
}

#[test]
fn what_the_kernel_can_not_do_is_learnt_and_errors_are_told() {
    let mut rig = Rig::new("/dev/shm", MIB);
    let token = Token {
        slot: 0,
        generation: 0,
    };
    rig.disk.ranges.places[0] = (0, 4096);
    rig.disk.ranges.discard = Discard::Command;
    let mut io = rig.disk.lend(&mut rig.ring);
    let mut end = |kind, errno: i32| io.finish_range(token, kind, -errno).result;
    assert_eq!(end(Kind::Zero(Zero::Keep), 28), Err(28), "ENOSPC");
    assert_eq!(end(Kind::Zero(Zero::Keep), EOPNOTSUPP), Err(EAGAIN));
    assert_eq!(end(Kind::Zero(Zero::Punch), 0), Ok(4096));
    assert!(rig.disk.ranges.punch && !rig.disk.ranges.keep);
    // Two were on their way before the first was answered.
    let (command, hole) = (Discard::Command, Discard::Hole);
    for (how, errno, want, left) in [
        (command, 5, Err(5), command),
        (command, EOPNOTSUPP, Err(EAGAIN), hole),
        (command, EOPNOTSUPP, Err(EAGAIN), hole),
        (hole, EOPNOTSUPP, Err(EAGAIN), Discard::Nothing),
        (command, EOPNOTSUPP, Err(EAGAIN), Discard::Nothing),
        (Discard::Nothing, 0, Ok(4096), Discard::Nothing),
    ] {
        let mut io = rig.disk.lend(&mut rig.ring);
        let done = io.finish_range(token, Kind::Discard(how), -errno);
        assert_eq!(done.result, want, "{how:?} {errno}");
        assert_eq!(rig.disk.ranges.discard, left, "{how:?} {errno}");
    }
    rig.disk.detach(&mut rig.ring);
}
