//! What a flush says when the kernel could not write what it has in its cache.

use std::fs::File;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{F_FLUSH, FLUSH, FrontEnd, IN, OUT};
use super::mounted::Mounted;
use super::served::{SECTOR, Served};
use crate::support::loop_device::Loop;
use crate::support::tmp::TempDir;

const MIB: usize = 1 << 20;
const IOERR: u8 = 1;

/// A disk in the page cache, whose device has less room than it says.
fn a_lost_write_is_never_forgotten<D: Driver>() {
    let Some(small) = Mounted::new("tmpfs", "size=4M") else {
        return;
    };
    let path = small.path("disk.img");
    File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let Some(device) = Loop::over(&path, 512) else {
        return;
    };
    let served = Served::start(
        TempDir::new("flush"),
        &format!("path={},direct=false", device.0),
    );
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
    let log = served.daemon.log();
    let told = log.matches("could not be written").count();
    assert_eq!(told, 1, "one line: {log}");
}

#[test]
fn a_flush_that_failed_fails_for_ever_on_a_split_ring() {
    a_lost_write_is_never_forgotten::<SplitDriver>();
}

#[test]
fn a_flush_that_failed_fails_for_ever_on_a_packed_ring() {
    a_lost_write_is_never_forgotten::<PackedDriver>();
}
