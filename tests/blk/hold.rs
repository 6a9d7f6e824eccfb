//! Disks that are full, or slow: what waits, what goes on, and what is told of it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::front_end::{F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd, IN, OUT, WRITE_ZEROES, range};
use super::served::{Served, assert_same};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::loop_device::Loop;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const SOON: Duration = Duration::from_secs(20);
const MIB: usize = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
/// Bytes of each request.
const LEN: usize = 16384;

/// What the small file system is: in memory, where the worker writes itself and at once; or on a
/// device, where io_uring does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Below {
    Memory,
    Device,
}

/// A daemon with a disk on a file system of 4 MiB, of which a filler has half, and with one in
/// memory; one worker serves both. Nobody else sees the file system, which goes with the daemon.
pub struct Small {
    pub daemon: Daemon,
    pub dir: TempDir,
    _device: Option<Loop>,
}

impl Small {
    pub fn start(idle: &str, keys: &str) -> Small {
        Small::start_on(Below::Memory, idle, keys).expect("tmpfs is everywhere")
    }

    /// `None` where there are no loop devices.
    fn start_on(below: Below, idle: &str, keys: &str) -> Option<Small> {
        let dir = TempDir::new("small");
        let mnt = dir.path("mnt");
        fs::create_dir(&mnt).unwrap();
        let mnt = mnt.display();
        let mut device = None;
        let mount = match below {
            Below::Memory => format!("mount -t tmpfs -o size=4M small {mnt}"),
            Below::Device => {
                let file = dir.path("device.img");
                fs::File::create(&file)
                    .unwrap()
                    .set_len(4500 << 10)
                    .unwrap();
                let on = &device.insert(Loop::over(&file, 512)?).0;
                // Without a journal, which would keep what was freed for a while.
                let make = format!("mkfs.ext4 -q -b 4096 -N 16 -m 0 -O ^has_journal {on}");
                format!("{make} && mount -t ext4 {on} {mnt}")
            }
        };
        let script = format!(
            "{mount} && truncate -s 8M {mnt}/disk.img && \
             head -c 2M /dev/urandom >{mnt}/filler && exec \"$0\" \"$@\""
        );
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_vringd")]);
        let full = format!(
            "name=full,socket={},path={mnt}/disk.img{keys}",
            dir.path("full.sock").display()
        );
        let other = format!(
            "name=other,socket={},backend=ram:8M",
            dir.path("other.sock").display()
        );
        let args = ["run", "--core", "1", "--idle", idle];
        let args = [&args[..], &["--blk", &full, "--blk", &other]].concat();
        let daemon = Daemon::spawn(command, &args);
        Some(Small {
            daemon,
            dir,
            _device: device,
        })
    }

    /// Who did the I/O of the disk.
    fn is_on(&self, below: Below) {
        let at_once = self.daemon.counter("full", "at_once");
        assert_eq!(at_once > 0, below == Below::Memory, "{at_once} at once");
    }

    fn open<D: Driver>(&self, disk: &str) -> FrontEnd<D> {
        let socket = self.dir.path(&format!("{disk}.sock"));
        FrontEnd::open(&socket, F_FLUSH | F_WRITE_ZEROES)
    }

    /// A file of its file system, as we see it.
    pub fn file(&self, name: &str) -> PathBuf {
        let inside = self.dir.path("mnt").join(name);
        let inside = inside.strip_prefix("/").unwrap();
        PathBuf::from(format!("/proc/{}/root", self.daemon.pid())).join(inside)
    }

    pub fn wait_counter(&self, name: &str, what: impl Fn(u64) -> bool) -> u64 {
        wait_until(name, SOON, || {
            Some(self.daemon.counter("full", name)).filter(|value| what(*value))
        })
    }
}

/// The sector and the data of the `number`th request.
fn block(number: usize) -> (u64, Vec<u8>) {
    let sector = number * LEN / 512;
    (sector as u64, random_bytes(number as u64 + 77, LEN))
}

/// Fills the disk until writes wait; returns what the file must be when they are done, and the
/// number of the first that was posted and not awaited.
fn fill<D: Driver>(small: &Small, front: &mut FrontEnd<D>) -> Vec<u8> {
    let mut model = vec![0; 8 * MIB];
    let mut put = |number: usize, data: &[u8]| {
        model[number * LEN..(number + 1) * LEN].copy_from_slice(data);
    };
    // Of 4 MiB nearly two are left: what is more than that by 40 requests.
    let mut number = 0;
    while small.daemon.counter("full", "held") == 0 {
        assert!(number < 200, "4 MiB hold more than that");
        for place in 0..4 {
            let (sector, data) = block(number);
            front.post(place, OUT, sector, &data, 0);
            put(number, &data);
            number += 1;
        }
        wait_until("done or held", SOON, || {
            while let Some((_, answer)) = front.answered() {
                assert_eq!(answer.status, OK);
            }
            let held = small.daemon.counter("full", "held");
            (front.waits() as u64 == held).then_some(())
        });
    }
    for place in 4..8 {
        let (sector, data) = block(number);
        front.post(place, OUT, sector, &data, 0);
        put(number, &data);
        number += 1;
    }
    model
}

fn waits_for_space<D: Driver>(below: Below, idle: &str, keys: &str) {
    let Some(small) = Small::start_on(below, idle, &format!(",on_enospc=hold{keys}")) else {
        return;
    };
    let mut front: FrontEnd<D> = small.open("full");
    let model = fill(&small, &mut front);
    let waiting = front.waits() as u64;
    assert!(waiting >= 5);
    small.wait_counter("held", |held| held == waiting);
    let line = "blk full queue 0: no space left: what can't be written waits";
    small.daemon.wait_log(line, SOON);
    assert_eq!(small.daemon.log().matches(line).count(), 1);
    // It is tried again, more than once, and nothing that waits is answered.
    let before = small.daemon.counter("full", "held_retries");
    small.wait_counter("held_retries", |now| now >= before + 2 * waiting);
    assert_eq!(small.daemon.counter("full", "held"), waiting);
    assert_eq!(front.answered(), None);
    // The disk goes on: reads, flushes, writes to what has its space; and so does the other one.
    for number in 0..20 {
        let (sector, data) = block(number);
        let answer = front.run(IN, sector, &[], LEN);
        assert_same("read", &answer.data, &data);
        assert_eq!(front.run(OUT, sector, &data, 0).status, OK);
        assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    }
    let mut other: FrontEnd<SplitDriver> = small.open("other");
    for number in 0..20 {
        let (sector, data) = block(number);
        assert_eq!(other.run(OUT, sector, &data, 0).status, OK);
        assert_same("other", &other.run(IN, sector, &[], LEN).data, &data);
    }
    assert_eq!(small.daemon.counter("other", "held"), 0);
    // There is space again.
    fs::remove_file(small.file("filler")).unwrap();
    for (place, answer) in front.all_answers() {
        assert_eq!((answer.status, answer.used), (OK, 1), "place {place}");
    }
    small
        .daemon
        .wait_log("nothing waits for space any more", SOON);
    small.wait_counter("held", |held| held == 0);
    assert_eq!(small.daemon.counter("full", "errors"), 0);
    small.is_on(below);
    assert_same(
        "the file",
        &fs::read(small.file("disk.img")).unwrap(),
        &model,
    );
    drop((front, other));
    let (status, log) = small.daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn writes_wait_for_space_and_all_else_goes_on() {
    waits_for_space::<SplitDriver>(Below::Memory, "adaptive", "");
    waits_for_space::<PackedDriver>(Below::Memory, "interrupt", ",cache=writethrough");
    waits_for_space::<PackedDriver>(Below::Memory, "spin", ",direct=false");
}

#[test]
fn what_io_uring_finds_no_space_for_waits() {
    waits_for_space::<PackedDriver>(Below::Device, "adaptive", "");
    waits_for_space::<SplitDriver>(Below::Device, "interrupt", ",direct=false");
}

#[test]
fn without_hold_a_full_disk_is_reported_to_the_guest() {
    for below in [Below::Memory, Below::Device] {
        is_reported(below);
    }
}

fn is_reported(below: Below) {
    let Some(small) = Small::start_on(below, "adaptive", "") else {
        return;
    };
    let mut front: FrontEnd<SplitDriver> = small.open("full");
    let mut written = 0;
    for number in 0.. {
        let (sector, data) = block(number);
        let answer = front.run(OUT, sector, &data, 0);
        if answer.status == IOERR {
            break;
        }
        written = number;
        assert!(number < 200, "4 MiB hold more than that");
    }
    for number in 0..=written {
        let (sector, data) = block(number);
        assert_same("read", &front.run(IN, sector, &[], LEN).data, &data);
    }
    assert_eq!(small.daemon.counter("full", "held"), 0);
    assert_eq!(small.daemon.counter("full", "errors"), 1);
    small.is_on(below);
    // The guest makes room itself, or somebody else does.
    fs::remove_file(small.file("filler")).unwrap();
    for number in written + 1..written + 20 {
        let (sector, data) = block(number);
        assert_eq!(front.run(OUT, sector, &data, 0).status, OK);
        assert_same("read", &front.run(IN, sector, &[], LEN).data, &data);
    }
}

#[test]
fn zeroes_wait_like_writes_and_a_smaller_disk_ends_the_wait() {
    let small = Small::start("adaptive", ",on_enospc=hold");
    let mut front: FrontEnd<SplitDriver> = small.open("full");
    fill(&small, &mut front);
    let waiting = front.waits() as u64;
    // Space is kept for what is zeroed without UNMAP.
    front.post(9, WRITE_ZEROES, 0, &range(12288, 4096, 0), 0);
    small.wait_counter("held", |held| held == waiting + 1);
    // What is written nowhere near its end, and has its space, is not in the way.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(small.file("disk.img"));
    file.unwrap().set_len(MIB as u64).unwrap();
    // There is much space now, but not for what lies beyond the end.
    for (place, answer) in front.all_answers() {
        assert_eq!(answer.status, IOERR, "place {place}");
    }
    small.wait_counter("held", |held| held == 0);
    let line = format!("{} of it failed", waiting + 1);
    small.daemon.wait_log(&line, SOON);
    assert_eq!(
        fs::metadata(small.file("disk.img")).unwrap().len(),
        MIB as u64
    );
}

#[test]
fn what_waits_is_tried_once_more_when_the_queue_stops_and_fails() {
    for stop_by_signal in [false, true] {
        let served = Served::start(
            TempDir::new("held"),
            "backend=ram:8M,on_enospc=hold,fault=enospc=1",
        );
        let mut front: FrontEnd<PackedDriver> = served.open(F_FLUSH);
        for place in 0..5 {
            let (sector, data) = block(usize::try_from(place).unwrap());
            front.post(place, OUT, sector, &data, 0);
        }
        wait_until("held", SOON, || {
            (served.daemon.counter("disk0", "held") == 5).then_some(())
        });
        assert_eq!(front.run(IN, 0, &[], 4096).data, [0; 4096]);
        if stop_by_signal {
            let (status, log) = served.daemon.stop();
            assert!(status.success(), "{log}");
            let last = log
                .lines()
                .rfind(|line| line.contains("counters device=disk0"));
            let last = last.expect("counters at the end");
            assert!(
                last.contains(" errors=5 ") && last.contains(" held=0 "),
                "{last}"
            );
        } else {
            front.stop();
            assert_eq!(served.daemon.counter("disk0", "held"), 0);
            assert_eq!(served.daemon.counter("disk0", "oldest_ms"), 0);
        }
        // The used ring has them all: the front-end gets its base after that.
        for (place, answer) in front.all_answers() {
            assert_eq!(answer.status, IOERR, "place {place}");
        }
    }
}

#[test]
fn a_disk_that_is_full_for_a_while_loses_nothing() {
    let keys = "backend=ram:8M,on_enospc=hold,fault=enospc=3";
    let served = Served::start(TempDir::new("held"), keys);
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    for place in 0..8 {
        let (sector, data) = block(usize::try_from(place).unwrap());
        front.post(place, OUT, sector, &data, 0);
    }
    let answers = front.all_answers();
    assert_eq!(answers.len(), 8);
    for (place, answer) in answers {
        assert_eq!((answer.status, answer.used), (OK, 1), "place {place}");
    }
    for number in 0..8 {
        let (sector, data) = block(number);
        assert_same("read", &front.run(IN, sector, &[], LEN).data, &data);
    }
    assert!(served.daemon.counter("disk0", "held_retries") >= 2);
    assert_eq!(served.daemon.counter("disk0", "held"), 0);
}

#[test]
fn what_takes_too_long_is_told_of_once_and_counted() {
    // It takes for ever: no machine is too slow for this test.
    let keys = "backend=ram:8M,on_enospc=hold,fault=enospc=1,io_timeout=100ms";
    let served = Served::start(TempDir::new("late"), keys);
    let mut front: FrontEnd<SplitDriver> = served.open(F_FLUSH);
    assert_eq!(served.daemon.counter("disk0", "oldest_ms"), 0);
    let (sector, data) = block(3);
    front.post(0, OUT, sector, &data, 0);
    let line = "blk disk0 queue 0: 1 request in flight for longer than 100ms; the oldest, a write \
                of 16384 bytes at 49152, for ";
    served.daemon.wait_log(line, SOON);
    let counter = |name| served.daemon.counter("disk0", name);
    let older = |than: u64| {
        wait_until("it gets older", SOON, || {
            Some(counter("oldest_ms")).filter(|age| *age > than)
        })
    };
    let age = older(100);
    older(age + 1500);
    assert_eq!(counter("timeouts"), 1, "counted once");
    assert_eq!(served.daemon.log().matches(line).count(), 1, "told once");
    for place in 1..4 {
        front.post(place, OUT, 0, &data, 0);
    }
    wait_until("the others are late, too", SOON, || {
        (counter("timeouts") == 4).then_some(())
    });
    front.stop();
    assert_eq!(counter("oldest_ms"), 0);
}

#[test]
fn a_slow_disk_is_told_of_and_finishes_its_requests() {
    let dir = TempDir::new("slow");
    let disk = |name: &str, keys: &str| {
        let socket = dir.path(&format!("{name}.sock"));
        format!("name={name},socket={},{keys}", socket.display())
    };
    let slow = disk(
        "slow",
        "backend=ram:8M,io_timeout=100ms,fault=delay_us=4000000",
    );
    let well = disk("well", "backend=ram:8M,io_timeout=100ms");
    let args = ["run", "--core", "1", "--idle", "interrupt"];
    let daemon = Daemon::start(&[&args[..], &["--blk", &slow, "--blk", &well]].concat());
    let open = |name: &str| -> FrontEnd<PackedDriver> {
        FrontEnd::open(&dir.path(&format!("{name}.sock")), F_FLUSH)
    };
    let (mut front, mut other) = (open("slow"), open("well"));
    let (sector, data) = block(5);
    front.post(0, OUT, sector, &data, 0);
    front.post(1, FLUSH, 0, &[], 0);
    for number in 0..20 {
        let (sector, data) = block(number);
        assert_eq!(other.run(OUT, sector, &data, 0).status, OK);
        assert_same("other", &other.run(IN, sector, &[], LEN).data, &data);
    }
    let answers = front.all_answers();
    assert!(answers.iter().all(|(_, answer)| answer.status == OK));
    daemon.wait_log("blk slow queue 0: ", SOON);
    assert_eq!(daemon.counter("slow", "timeouts"), 2);
    assert_eq!(daemon.counter("slow", "errors"), 0);
    wait_until("nothing is old any more", SOON, || {
        (daemon.counter("slow", "oldest_ms") == 0).then_some(())
    });
    assert_eq!(daemon.counter("well", "timeouts"), 0);
    assert_same("slow", &front.run(IN, sector, &[], LEN).data, &data);
}
