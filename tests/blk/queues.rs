//! A disk of two queues, of which one waits for space for as long as it takes: the other goes on.

use std::fs::{self, File};
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use super::hold::Small;
use super::served::assert_same;
use super::two_queues::{F_FLUSH, FLUSH, FrontEnd, OUT};
use crate::support::daemon::Daemon;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const SOON: Duration = Duration::from_secs(20);
const LEN: usize = 16384;
/// Requests of the queue that waits have names from here on.
const WAITS: u32 = 1000;

/// Writes block `number` of the disk through `queue`.
fn write<D: Driver>(
    front: &mut FrontEnd<D>,
    model: &mut [u8],
    queue: usize,
    name: u32,
    number: usize,
) {
    let seed = u64::from(name) * 100 + number as u64;
    let (at, data) = (number * LEN, random_bytes(seed, LEN));
    front.submit(queue, name, OUT, (at / 512) as u64, &data);
    model[at..at + LEN].copy_from_slice(&data);
}

/// Waits until `left` requests are in flight; none that waits for space is answered meanwhile.
fn answered<D: Driver>(front: &mut FrontEnd<D>, left: usize) {
    while front.in_flight() > left {
        let done = front.reap();
        assert!(done.iter().all(|name| *name < WAITS), "{done:?}");
    }
}

fn goes_on<D: Driver>(idle: &str) {
    let small = Small::start(idle, ",on_enospc=hold,io_timeout=100ms");
    let mut front = FrontEnd::<D>::open(&small.dir.path("full.sock"), F_FLUSH);
    let mut model = vec![0; 8 << 20];
    for number in 0..4 {
        write(&mut front, &mut model, 1, 1, number);
    }
    answered(&mut front, 0);
    // What is left of the file system goes.
    let filler = File::options().append(true).open(small.file("filler"));
    let mut filler = filler.unwrap();
    while filler.write(&[0xff; 4096]).is_ok() {}
    drop(filler);
    for number in 4..8 {
        let name = WAITS + u32::try_from(number).unwrap();
        write(&mut front, &mut model, 0, name, number);
    }
    small.wait_counter("held", |held| held == 4);
    // It takes for ever: no machine is too slow for this test.
    small.wait_counter("timeouts", |late| late >= 4);
    small
        .daemon
        .wait_log("blk full queue 0: no space left", SOON);
    for name in 2..22 {
        for number in 0..4 {
            write(&mut front, &mut model, 1, name, number);
        }
        front.submit(1, name, FLUSH, 0, &[]);
        answered(&mut front, 4);
    }
    assert_eq!(small.daemon.counter("full", "held"), 4);
    fs::remove_file(small.file("filler")).unwrap();
    while front.in_flight() > 0 {
        front.reap();
    }
    small.wait_counter("held", |held| held == 0);
    assert_eq!(small.daemon.counter("full", "errors"), 0);
    let file = fs::read(small.file("disk.img")).unwrap();
    assert_same("the file", &file, &model);
}

/// Each queue of each guest has two or three files: the usual limit of 1024 is soon used up.
#[test]
fn as_many_files_may_be_open_as_the_hard_limit_allows() {
    let dir = TempDir::new("files");
    let socket = dir.path("s").display().to_string();
    let disk = format!("socket={socket},backend=ram:1M");
    let mut limited = Command::new("prlimit");
    limited.args(["--nofile=40:5000", env!("CARGO_BIN_EXE_vringd")]);
    let daemon = Daemon::spawn(limited, &["run", "--blk", &disk]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let files: Vec<_> = files.unwrap().split_whitespace().skip(3).collect();
    assert_eq!(files, ["5000", "5000", "files"]);
}

#[test]
fn while_one_queue_waits_for_space_the_other_goes_on() {
    goes_on::<SplitDriver>("adaptive");
    goes_on::<PackedDriver>("interrupt");
}
