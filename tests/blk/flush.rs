//! What a flush says when the kernel could not write what it has in its cache.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{F_FLUSH, FLUSH, FrontEnd, IN, OUT};
use super::mounted::Mounted;
use super::served::{SECTOR, Served};
use crate::support::loop_device::Loop;
use crate::support::open_files::open_files;
use crate::support::tmp::TempDir;

const MIB: usize = 1 << 20;
const IOERR: u8 = 1;

/// A disk in the page cache, whose device has less room than it says.
struct Small {
    served: Served,
    device: Loop,
    _file: Mounted,
}

impl Small {
    fn new() -> Option<Small> {
        let file = Mounted::new("tmpfs", "size=4M")?;
        let path = file.path("disk.img");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let device = Loop::over(&path, 512)?;
        let disk = format!("path={},direct=false", device.0);
        Some(Small {
            served: Served::start(TempDir::new("flush"), &disk),
            device,
            _file: file,
        })
    }
}

fn a_lost_write_is_never_forgotten<D: Driver>() {
    let Some(Small { served, .. }) = &Small::new() else {
        return;
    };
    let mut front: FrontEnd<D> = served.open(F_FLUSH);
    let data = vec![0x5a; MIB];
    let flush = |front: &mut FrontEnd<D>| front.run(FLUSH, 0, &[], 0).status;
    assert_eq!(front.run(OUT, 0, &data, 0).status, 0);
    assert_eq!(flush(&mut front), 0, "there is room for this");
    for at in 1..12 {
        let written = front.run(OUT, (at * MIB / SECTOR) as u64, &data, 0);
        assert_eq!(written.status, 0, "the cache takes it");
    }
    let statuses: Vec<_> = (0..5).map(|_| flush(&mut front)).collect();
    assert_eq!(statuses, [IOERR; 5], "the kernel tells only once");
    // Somebody else's flushes are no better.
    drop(front);
    let mut front: FrontEnd<D> = served.open(F_FLUSH);
    assert_eq!(flush(&mut front), IOERR);
    assert_eq!(front.run(IN, 0, &[], 4096).status, 0, "reads go on");
    let why = "could not be written";
    served.daemon.wait_log(why, Duration::from_secs(20));
    let log = served.daemon.log();
    let told = log.matches(why).count();
    assert_eq!(told, 1, "one line: {log}");
}

/// A write that is durable by itself is told of data before it that could not be written, and the
/// kernel tells nobody else.
fn a_durable_write_is_told_of_a_lost_one<D: Driver>() {
    let Some(Small { served, device, .. }) = &Small::new() else {
        return;
    };
    let mut front: FrontEnd<D> = served.open(F_FLUSH);
    let data = vec![0x5a; MIB];
    for at in 0..12 {
        let written = front.run(OUT, (at * MIB / SECTOR) as u64, &data, 0);
        assert_eq!(written.status, 0, "the cache takes it");
    }
    drop(front);
    // The kernel writes when it likes; its answer to us is ours alone.
    let now = File::options().write(true).open(&device.0).unwrap();
    assert!(now.sync_data().is_err(), "there is no room");
    // Without FLUSH each write is durable.
    let mut front: FrontEnd<D> = served.open(0);
    let statuses: Vec<_> = (0..3)
        .map(|_| front.run(OUT, 0, &data[..4096], 0).status)
        .collect();
    assert_eq!(statuses, [IOERR; 3]);
    drop(front);
    let mut front: FrontEnd<D> = served.open(F_FLUSH);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, IOERR);
}

/// The kernel tells of what was lost once, and whoever it tells may be another queue, or a request
/// that was sent at the same time: here it is this test, which has the daemon's own open files.
fn a_loss_is_known_whoever_was_told<D: Driver>(features: u64) {
    let Some(Small { served, device, .. }) = &Small::new() else {
        return;
    };
    let mut front: FrontEnd<D> = served.open(features);
    let data = vec![0x5a; MIB];
    assert_eq!(front.run(OUT, 0, &data[..4096], 0).status, 0);
    // In the cache that the daemon has, too.
    let cached = File::options().write(true).open(&device.0).unwrap();
    for at in 0..12 {
        cached.write_all_at(&data, (at * MIB) as u64).unwrap();
    }
    let files = open_files(served.daemon.pid(), Path::new(&device.0));
    // The daemon asks by those that can't be written to. Each is told, and each once.
    let files: Vec<_> = files.iter().filter(|file| is_writable(file)).collect();
    let told = files
        .iter()
        .filter(|file| file.sync_data().is_err())
        .count();
    assert!(told > 0 && told == files.len(), "{told} of {}", files.len());
    for file in files {
        file.sync_data().expect("told once");
    }
    for _ in 0..3 {
        let status = match front.has(F_FLUSH) {
            true => front.run(FLUSH, 0, &[], 0).status,
            // Each write is durable; there is room for this one.
            false => front.run(OUT, 0, &data[..4096], 0).status,
        };
        assert_eq!(status, IOERR);
    }
}

fn is_writable(file: &File) -> bool {
    (&mut &*file).write(&[]).is_ok()
}

#[test]
fn a_flush_fails_after_another_was_told_of_a_loss_on_a_split_ring() {
    a_loss_is_known_whoever_was_told::<SplitDriver>(F_FLUSH);
}

#[test]
fn a_durable_write_fails_after_another_was_told_of_a_loss_on_a_packed_ring() {
    a_loss_is_known_whoever_was_told::<PackedDriver>(0);
}

#[test]
fn a_flush_fails_after_a_durable_write_was_told_of_a_loss_on_a_split_ring() {
    a_durable_write_is_told_of_a_lost_one::<SplitDriver>();
}

#[test]
fn a_flush_fails_after_a_durable_write_was_told_of_a_loss_on_a_packed_ring() {
    a_durable_write_is_told_of_a_lost_one::<PackedDriver>();
}

#[test]
fn a_flush_that_failed_fails_for_ever_on_a_split_ring() {
    a_lost_write_is_never_forgotten::<SplitDriver>();
}

#[test]
fn a_flush_that_failed_fails_for_ever_on_a_packed_ring() {
    a_lost_write_is_never_forgotten::<PackedDriver>();
}
