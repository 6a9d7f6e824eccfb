//! Sick disks: what fails is told to the guest, what can be mended is, and nothing hangs.

use super::front_end::{F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd, IN, OUT, WRITE_ZEROES, range};
use super::matrix;
use super::served::{DISK, Served, assert_same, image};
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const OK: u8 = 0;
const IOERR: u8 = 1;

#[test]
fn the_matrix_holds_on_a_disk_that_is_short_late_and_interrupted() {
    let fault = "fault=short=2+eintr=3+eagain=5+delay_us=20+reorder=2";
    let served = Served::start(TempDir::new("sick"), &format!("backend=ram:8M,{fault}"));
    matrix::run::<SplitDriver>(&served, vec![0; DISK], 512);
    drop(served);
    let dir = TempDir::new("sick");
    let (path, model) = image(&dir);
    let served = Served::start(dir, &format!("path={},{fault}", path.display()));
    let model = matrix::run::<PackedDriver>(&served, model, 512);
    assert!(served.daemon.counter("disk0", "short_ios") > 100);
    assert!(served.daemon.counter("disk0", "injected") > 300);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

fn every_third_fails<D: Driver>(fault: &str, fails: &[u32]) {
    let dir = TempDir::new("failing");
    let (path, mut model) = image(&dir);
    let served = Served::start(dir, &format!("path={},fault={fault}", path.display()));
    let mut front: FrontEnd<D> = served.open(F_FLUSH | F_WRITE_ZEROES);
    for (number, kind) in (1..).zip([IN, OUT, FLUSH, WRITE_ZEROES].repeat(9)) {
        let sector = 16 * number;
        let at = usize::try_from(sector).unwrap() * 512;
        let data = match kind {
            OUT => random_bytes(sector, 8192),
            // With UNMAP, which every file system has: one operation.
            WRITE_ZEROES => range(sector, 16, 1).to_vec(),
            _ => Vec::new(),
        };
        let data_in = if kind == IN { 8192 } else { 0 };
        let answer = front.run(kind, sector, &data, data_in);
        let fails = number % 3 == 0 && fails.contains(&kind);
        let want = if fails { IOERR } else { OK };
        assert_eq!(answer.status, want, "{fault}: {kind}, number {number}");
        match kind {
            _ if fails => {}
            IN => assert_same("read", &answer.data, &model[at..at + 8192]),
            OUT => model[at..at + 8192].copy_from_slice(&data),
            WRITE_ZEROES => model[at..at + 8192].fill(0),
            _ => {}
        }
    }
    assert!(served.daemon.counter("disk0", "errors") >= 3);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
}

#[test]
fn failures_are_told_and_change_nothing() {
    let all = [IN, OUT, FLUSH, WRITE_ZEROES];
    every_third_fails::<SplitDriver>("eio=3", &all);
    every_third_fails::<PackedDriver>("enospc=3", &[OUT, WRITE_ZEROES]);
}

#[test]
fn a_dropped_flush_is_answered_and_shown() {
    let served = Served::start(TempDir::new("liar"), "backend=ram:8M,fault=drop_flush");
    let mut front = served.open::<SplitDriver>(F_FLUSH);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    assert_eq!(served.daemon.counter("disk0", "injected"), 1);
    assert!(served.daemon.log().contains("faults are injected"));
}
