//! A disk in a file in memory, which is mapped: what is touched must have memory before, and what
//! somebody else takes away must cost no data and no daemon.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::time::Duration;

use super::front_end::{DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd};
use super::front_end::{IN, OUT, WRITE_ZEROES, range};
use super::mounted::Mounted;
use super::served::{DISK, SECTOR, Served, assert_same, image};
use crate::support::daemon::Daemon;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const MIB: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(20);
const FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

fn read<D: Driver>(front: &mut FrontEnd<D>, at: usize, bytes: usize) -> Vec<u8> {
    let back = front.run(IN, (at / SECTOR) as u64, &[], bytes);
    assert_eq!(back.status, 0, "{bytes} bytes at {at}");
    back.data
}

fn write<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], at: usize, bytes: &[u8]) {
    assert_eq!(front.run(OUT, (at / SECTOR) as u64, bytes, 0).status, 0);
    model[at..at + bytes.len()].copy_from_slice(bytes);
}

/// All of it, three times: the kernel is asked, and the second time it need not be.
fn reads_as<D: Driver>(front: &mut FrontEnd<D>, model: &[u8]) {
    for (round, step) in [65536, 4096, 20480].into_iter().enumerate() {
        for at in (0..DISK).step_by(step) {
            let bytes = step.min(DISK - at);
            let what = format!("{bytes} bytes at {at}, round {round}");
            assert_same(&what, &read(front, at, bytes), &model[at..at + bytes]);
        }
    }
}

fn kib(file: &File) -> u64 {
    file.metadata().unwrap().blocks() / 2
}

fn holes_stay_holes<D: Driver>() {
    let Some(mounted) = Mounted::new("tmpfs", "size=32M") else {
        return;
    };
    let path = mounted.path("sparse.img");
    let file = File::create_new(&path).unwrap();
    file.set_len(DISK as u64).unwrap();
    let mut model = vec![0; DISK];
    let bytes = random_bytes(9, MIB);
    file.write_all_at(&bytes, MIB as u64).unwrap();
    model[MIB..2 * MIB].copy_from_slice(&bytes);
    // Pages that are there and were never written.
    let preallocate = ["-o", "5M", "-l", "1M"].map(str::to_owned);
    let done = Command::new("fallocate")
        .args(preallocate)
        .arg(&path)
        .status();
    assert!(done.unwrap().success());
    let keys = format!("path={}", path.display());
    let served = Served::start(TempDir::new("memory"), &keys);
    let mut front: FrontEnd<D> = served.open(FEATURES);
    reads_as(&mut front, &model);
    assert_eq!(kib(&file), 2048, "reading makes no pages");
    // Pages that were holes, in part and as a whole, and some that were not.
    for (at, len) in [
        (512, 512),
        (MIB - 1024, 4096),
        (3 * MIB, 65536),
        (3 * MIB, 512),
    ] {
        let bytes = random_bytes(at as u64 + 1, len);
        write(&mut front, &mut model, at, &bytes);
    }
    reads_as(&mut front, &model);
    assert_eq!(kib(&file), 2048 + 4 + 4 + 64);
    for (kind, at) in [(DISCARD, MIB), (WRITE_ZEROES, 3 * MIB)] {
        let sectors = u32::try_from(65536 / SECTOR).unwrap();
        let range = range(
            (at / SECTOR) as u64,
            sectors,
            u32::from(kind == WRITE_ZEROES),
        );
        assert_eq!(front.run(kind, 0, &range, 0).status, 0);
        model[at..at + 65536].fill(0);
    }
    reads_as(&mut front, &model);
    assert_eq!(
        kib(&file),
        2048 + 4 + 4 + 64 - 128,
        "what was given back stays so"
    );
    let bytes = random_bytes(77, 8192);
    write(&mut front, &mut model, MIB + 4096, &bytes);
    // What somebody else writes is there, too.
    file.write_all_at(&bytes, 6 * MIB as u64).unwrap();
    model[6 * MIB..6 * MIB + 8192].copy_from_slice(&bytes);
    reads_as(&mut front, &model);
    assert_eq!(kib(&file), 2048 + 4 + 4 + 64 - 128 + 8 + 8);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    drop(front);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn a_sparse_file_in_memory_is_filled_by_writes_only_on_split_rings() {
    holes_stay_holes::<SplitDriver>();
}

#[test]
fn a_sparse_file_in_memory_is_filled_by_writes_only_on_packed_rings() {
    holes_stay_holes::<PackedDriver>();
}

/// Discards, and reads of what is beside them, all in flight at once, over and over.
fn discarded_stays_so<D: Driver>() {
    const BLOCK: usize = 16384;
    let Some(mounted) = Mounted::new("tmpfs", "size=32M") else {
        return;
    };
    let (path, mut model) = image(mounted.dir());
    let file = File::open(&path).unwrap();
    let keys = format!("path={}", path.display());
    let served = Served::start(TempDir::new("memory"), &keys);
    let mut front: FrontEnd<D> = served.open(FEATURES);
    reads_as(&mut front, &model);
    let mut left = kib(&file);
    // In each word of what is known of the file.
    for (round, at) in (0..DISK).step_by(MIB / 4).enumerate() {
        let kept = at + BLOCK;
        let bytes = random_bytes(round as u64, BLOCK);
        let discard = range(
            (at / SECTOR) as u64,
            (BLOCK / SECTOR).try_into().unwrap(),
            0,
        );
        front.post(0, OUT, (kept / SECTOR) as u64, &bytes, 0);
        front.post(1, DISCARD, 0, &discard, 0);
        for place in 2..6 {
            let at = kept + BLOCK * place;
            front.post(place as u64, IN, (at / SECTOR) as u64, &[], BLOCK);
        }
        let answers = front.all_answers();
        model[at..at + BLOCK].fill(0);
        model[kept..kept + BLOCK].copy_from_slice(&bytes);
        for (place, answer) in answers {
            assert_eq!(answer.status, 0, "{place}");
            if place > 1 {
                let at = kept + BLOCK * usize::try_from(place).unwrap();
                assert_same("a read beside it", &answer.data, &model[at..at + BLOCK]);
            }
        }
        left -= BLOCK as u64 / 1024;
        assert_same(
            "the rest",
            &read(&mut front, at, 4 * BLOCK),
            &model[at..at + 4 * BLOCK],
        );
        assert_eq!(kib(&file), left, "round {round}");
    }
    reads_as(&mut front, &model);
    assert_eq!(kib(&file), left);
}

#[test]
fn what_a_guest_gave_back_of_a_file_in_memory_stays_so_on_split_rings() {
    discarded_stays_so::<SplitDriver>();
}

#[test]
fn what_a_guest_gave_back_of_a_file_in_memory_stays_so_on_packed_rings() {
    discarded_stays_so::<PackedDriver>();
}

#[test]
fn a_file_in_memory_that_is_cut_costs_its_disk_what_was_cut_and_no_other_anything() {
    let (Some(sick), Some(well)) = (
        Mounted::new("tmpfs", "size=32M"),
        Mounted::new("tmpfs", "size=32M"),
    ) else {
        return;
    };
    let [(path, mut model), (other, mut kept)] = [&sick, &well].map(|at| image(at.dir()));
    let dir = TempDir::new("memory");
    let sockets = ["sick", "well"].map(|name| dir.path(name));
    let disk = |at: usize, path: &std::path::Path| {
        let socket = sockets[at].display();
        format!("name=disk{at},socket={socket},path={}", path.display())
    };
    let disks = [disk(0, &path), disk(1, &other)];
    let daemon = Daemon::start(&["run", "--blk", &disks[0], "--blk", &disks[1]]);
    let [mut front, mut neighbour] = sockets
        .each_ref()
        .map(|at| FrontEnd::<SplitDriver>::open(at, FEATURES));
    reads_as(&mut front, &model);
    reads_as(&mut neighbour, &kept);
    let open = || OpenOptions::new().write(true).open(&path).unwrap();
    let file = open();
    // The daemon notices when the file is closed.
    file.set_len(4 * MIB as u64).unwrap();
    // Gone, by two blocks and by all of one.
    for (at, bytes) in [(4 * MIB - 4096, 8192), (5 * MIB, 4096)] {
        let back = front.run(IN, (at / SECTOR) as u64, &[], bytes);
        assert_eq!(back.status, 1, "{bytes} bytes at {at}");
    }
    daemon.wait_log("a page of it was missing", SOON);
    for at in (0..4 * MIB).step_by(65536) {
        let got = read(&mut front, at, 65536);
        assert_same("what is left", &got, &model[at..at + 65536]);
    }
    let bytes = random_bytes(3, 65536);
    for at in [MIB, 4 * MIB - 65536] {
        write(&mut front, &mut model, at, &bytes);
    }
    write(&mut neighbour, &mut kept, MIB, &bytes);
    model.truncate(4 * MIB);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
    // It becomes what it was, and the next guest has it.
    drop(file);
    let line = "its medium has 4194304 bytes now";
    daemon.wait_log(line, SOON);
    open().set_len(DISK as u64).unwrap();
    let line = "grown from 4194304 to 8388608 bytes";
    daemon.wait_log(line, SOON);
    model.resize(DISK, 0);
    drop(front);
    let mut front = FrontEnd::<PackedDriver>::open(&sockets[0], FEATURES);
    reads_as(&mut front, &model);
    write(&mut front, &mut model, 6 * MIB, &bytes);
    reads_as(&mut front, &model);
    reads_as(&mut neighbour, &kept);
    drop((front, neighbour, daemon));
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
    assert_same("the other", &std::fs::read(&other).unwrap(), &kept);
}
