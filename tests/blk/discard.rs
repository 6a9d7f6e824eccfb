//! Block devices that give space back: what config space says of it, and what becomes of the file
//! under a loop device.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::front_end::{DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd};
use super::front_end::{IN, WRITE_ZEROES, range};
use super::mounted::Mounted;
use super::served::{DISK, SECTOR, Served, assert_same, image};
use crate::support::loop_device::Loop;
use crate::support::tmp::TempDir;
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const MIB: usize = 1 << 20;
const FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

/// Bytes that the file takes on its disk.
fn allocated(path: &Path) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Whether `less` bytes and no more were given back, up to what the file system needs for itself.
fn gave_back(path: &Path, before: u64, less: usize) {
    let (now, less) = (allocated(path), less as u64);
    let want = before - less..=before - less + 64 * 1024;
    assert!(
        want.contains(&now),
        "{now} bytes of {before}, not {less} less"
    );
}

/// A request about `bytes` bytes from `at` on.
fn ask<D: Driver>(front: &mut FrontEnd<D>, kind: u32, at: usize, bytes: usize, flags: u32) {
    let sectors = u32::try_from(bytes / SECTOR).unwrap();
    let range = range((at / SECTOR) as u64, sectors, flags);
    assert_eq!(front.run(kind, 0, &range, 0).status, 0, "{kind} at {at}");
}

/// Commands of a kind that the device has done: the field of its `stat`.
fn done(device: &Loop, field: usize) -> u64 {
    let stat = device.told("stat");
    let number = stat.split_whitespace().nth(field);
    number
        .and_then(|number| number.parse().ok())
        .expect("a number")
}

const DISCARDS: usize = 11;

fn space_is_given_back<D: Driver>(block: u32) {
    let dir = TempDir::new("discards");
    let (path, mut model) = image(&dir);
    let Some(device) = Loop::over(&path, block) else {
        return;
    };
    let keys = format!("path={},block_size={block}", device.0);
    let served = Served::start(TempDir::new("discards"), &keys);
    let mut front: FrontEnd<D> = served.open(FEATURES);
    let config = front.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let told = |name: &str| -> u64 {
        let text = device.told(&format!("queue/{name}"));
        text.trim().parse().unwrap()
    };
    let most = told("discard_max_bytes").min(256 << 20) / u64::from(block) * u64::from(block);
    assert_eq!(u64::from(word(36)) * 512, most, "the longest discard");
    let granularity = told("discard_granularity").max(told("physical_block_size"));
    assert_eq!(
        u64::from(word(44)) * 512,
        granularity,
        "alignment of discards"
    );
    let full = allocated(&path);
    let before = done(&device, DISCARDS);
    ask(&mut front, DISCARD, MIB, MIB, 0);
    gave_back(&path, full, MIB);
    assert!(done(&device, DISCARDS) > before, "a command of its own");
    // What is discarded of a loop device is zero.
    model[MIB..2 * MIB].fill(0);
    ask(&mut front, WRITE_ZEROES, 3 * MIB, MIB, 0);
    gave_back(&path, full, MIB);
    ask(&mut front, WRITE_ZEROES, 5 * MIB, MIB, 1);
    gave_back(&path, full, 2 * MIB);
    // One block, less than is ever given back where blocks are small.
    let at = 7 * MIB + block as usize;
    ask(&mut front, WRITE_ZEROES, at, block as usize, 1);
    for (at, bytes) in [(3 * MIB, MIB), (5 * MIB, MIB), (at, block as usize)] {
        model[at..at + bytes].fill(0);
    }
    for at in (0..DISK).step_by(MIB) {
        let back = front.run(IN, (at / SECTOR) as u64, &[], MIB);
        assert_same("read", &back.data, &model[at..at + MIB]);
    }
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    drop((front, served, device));
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn a_block_device_gives_space_back_in_blocks_of_512() {
    space_is_given_back::<SplitDriver>(512);
}

#[test]
fn a_block_device_gives_space_back_in_blocks_of_4096() {
    space_is_given_back::<PackedDriver>(4096);
}

#[test]
fn where_a_device_can_not_discard_the_guest_is_answered_and_zeros_are_written() {
    let Some(ramfs) = Mounted::new("ramfs", "none") else {
        return;
    };
    let (path, mut model) = image(ramfs.dir());
    let Some(device) = Loop::over(&path, 512) else {
        return;
    };
    assert_eq!(device.told("queue/discard_max_bytes").trim(), "0");
    let served = Served::start(TempDir::new("discards"), &format!("path={}", device.0));
    let mut front: FrontEnd<SplitDriver> = served.open(FEATURES);
    assert!(
        front.has(F_DISCARD),
        "a guest may move to where it has an effect"
    );
    ask(&mut front, DISCARD, 3 * MIB, MIB, 0);
    for (at, flags) in [(MIB, 0), (2 * MIB, 1)] {
        ask(&mut front, WRITE_ZEROES, at, MIB, flags);
        model[at..at + MIB].fill(0);
    }
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
    drop((front, served, device));
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}
