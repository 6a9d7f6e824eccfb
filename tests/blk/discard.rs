//! Block devices that give space back: what config space says of it, and what becomes of the file
//! under a loop device. And the longest ranges, of files too.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::front_end::{DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd};
use super::front_end::{IN, OUT, WRITE_ZEROES, range};
use super::mounted::Mounted;
use super::served::{DISK, SECTOR, Served, Way, assert_same, image, on_a_disk};
use crate::support::deadline::wait_until;
use crate::support::linux;
use crate::support::loop_device::Loop;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::sys::uring::{Uring, UringOp};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const MIB: usize = 1 << 20;
const FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

/// Bytes that the file takes on its disk.
fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
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
const IOERR: u8 = 1;

/// Whether the kernel takes a discard of a block device through io_uring: from 6.12 on it has to.
/// Then this range of the device is discarded.
fn takes_the_command(device: &Path, at: usize, bytes: usize) -> bool {
    let file = File::options().read(true).write(true).open(device).unwrap();
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(1);
    let op = UringOp::Discard {
        file: ring.add_file(&file).unwrap(),
        offset: at as u64,
        bytes: u32::try_from(bytes).unwrap(),
    };
    assert!(ring.submit(client, 0, op));
    let (_, result) = wait_until("the kernel answers", Duration::from_secs(20), || {
        ring.enter();
        ring.reap(client)
    });
    let older = linux() < (6, 12);
    assert!(
        result == 0 || older && result == -libc::EOPNOTSUPP,
        "{result}"
    );
    result == 0
}

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
    let by_command = takes_the_command(Path::new(&device.0), 6 * MIB, MIB);
    if by_command {
        model[6 * MIB..7 * MIB].fill(0);
    }
    let full = allocated(&path);
    let before = done(&device, DISCARDS);
    ask(&mut front, DISCARD, MIB, MIB, 0);
    gave_back(&path, full, MIB);
    // Without the command a hole is next, which a loop device takes for zeroing.
    let discarded = done(&device, DISCARDS) > before;
    assert_eq!(discarded, by_command, "on Linux {:?}", linux());
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
    assert_same("the file", &fs::read(&path).unwrap(), &model);
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
    assert_same("the file", &fs::read(&path).unwrap(), &model);
}

/// A disk that is larger than any range of a request, and much larger than what is on it.
const LARGE: u64 = 3 << 30;
/// What is on it is in such pieces.
const PIECE: usize = 4096;

/// Pieces of a large disk, by their first sectors, and what is in them.
type Pieces = Vec<(u64, Vec<u8>)>;

fn write_pieces<D: Driver>(front: &mut FrontEnd<D>, sectors: &[u64]) -> Pieces {
    let written = sectors.iter().map(|&sector| {
        let data = random_bytes(sector, PIECE);
        assert_eq!(
            front.run(OUT, sector, &data, 0).status,
            0,
            "write at {sector}"
        );
        (sector, data)
    });
    written.collect()
}

fn check_pieces<D: Driver>(front: &mut FrontEnd<D>, what: &str, pieces: &Pieces) {
    for (sector, data) in pieces {
        let back = front.run(IN, *sector, &[], PIECE);
        assert_eq!(back.status, 0, "{what}: read at {sector}");
        assert_same(&format!("{what}: at {sector}"), &back.data, data);
    }
}

/// The longest range that there may be is done, to its last block and no further; one more block
/// is refused, and nothing is done then. VIRTIO 1.3 §5.2.6.
fn the_longest_range<D: Driver>(front: &mut FrontEnd<D>, file: &Path, block: u32) {
    let block = u64::from(block) / SECTOR as u64;
    let piece = (PIECE / SECTOR) as u64;
    for (kind, limit, flags) in [
        (DISCARD, 36, 0),
        (WRITE_ZEROES, 48, 0),
        (WRITE_ZEROES, 48, 1),
    ] {
        let what = format!("{kind}, flags {flags}, in blocks of {block} sectors");
        let most = front.config()[limit..limit + 4].try_into().unwrap();
        let most = u32::from_le_bytes(most);
        let longest = u64::from(most);
        let from = (1 << 30) / SECTOR as u64;
        assert!(longest > 2 * piece && from + longest + 2 * piece < LARGE / SECTOR as u64);
        assert!(longest.is_multiple_of(block), "{what}: a limit in blocks");
        let inside = [
            from,
            from + longest / 2 / piece * piece,
            from + longest - piece,
        ];
        let mut pieces = write_pieces(front, &inside);
        pieces.extend(write_pieces(front, &[from - piece, from + longest]));
        let before = allocated(file);
        // A range that could be done goes before it.
        let more = most + u32::try_from(block).unwrap();
        let good = range(from, u32::try_from(piece).unwrap(), flags);
        for ranges in [
            &range(from, more, flags)[..],
            &[good, range(from, more, flags)].concat(),
        ] {
            let refused = front.run(kind, 0, ranges, 0);
            assert_eq!((refused.status, refused.used), (IOERR, 1), "{what}");
            check_pieces(front, &what, &pieces);
            assert_eq!(allocated(file), before, "{what}");
        }
        let done = front.run(kind, 0, &range(from, most, flags), 0);
        assert_eq!((done.status, done.used), (0, 1), "{what}");
        for (_, data) in &mut pieces[..inside.len()] {
            data.fill(0);
        }
        check_pieces(front, &what, &pieces);
    }
}

/// On a sparse file, or on a device over one.
fn on_a_large_disk<D: Driver>(device: bool, block: u32) {
    let Some(dir) = on_a_disk("large") else {
        return;
    };
    let path = dir.path("disk.img");
    File::create(&path).unwrap().set_len(LARGE).unwrap();
    let device = match device.then(|| Loop::over(&path, block)) {
        Some(None) => return,
        made => made.flatten(),
    };
    let disk = device
        .as_ref()
        .map_or(&*path, |device| Path::new(&device.0));
    let keys = format!("path={},block_size={block}", disk.display());
    let served = Served::start(TempDir::new("large"), &keys);
    assert_eq!(served.way(disk), Way::Direct);
    the_longest_range(&mut served.open::<D>(FEATURES), &path, block);
}

#[test]
fn the_longest_range_of_a_large_file_is_done_and_no_longer_one() {
    on_a_large_disk::<SplitDriver>(false, 512);
    on_a_large_disk::<PackedDriver>(false, 4096);
}

#[test]
fn the_longest_range_of_a_large_device_is_done_and_no_longer_one() {
    on_a_large_disk::<SplitDriver>(true, 512);
    on_a_large_disk::<PackedDriver>(true, 4096);
}
