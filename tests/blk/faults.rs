//! Sick disks: what fails is told to the guest, what can be mended is, and nothing hangs.

use std::time::{Duration, Instant};

use super::front_end::{F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd, IN, OUT, WRITE_ZEROES, range};
use super::matrix;
use super::served::{DISK, Served, assert_same, image};
use super::two_queues;
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

const OK: u8 = 0;
const IOERR: u8 = 1;
const PATIENCE: Duration = Duration::from_secs(20);

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

/// The disk has nothing more to tell the worker by which it would wake up.
#[test]
fn what_a_disabled_queue_has_in_flight_is_answered() {
    let keys = "backend=ram:8M,io_timeout=off,fault=delay_us=500000";
    let served = Served::start(TempDir::new("disabled"), keys);
    let mut front = served.open::<SplitDriver>(F_FLUSH);
    for place in 0..4 {
        front.post(place, FLUSH, 0, &[], 0);
    }
    // Time for the worker to take them, and to go to sleep.
    (0..3).for_each(|_| assert_eq!(served.daemon.counter("disk0", "flushes"), 0));
    front.disable();
    let answers = front.all_answers();
    assert!(answers.iter().all(|(_, answer)| answer.status == OK));
}

/// A daemon whose disk is well at first.
struct Changing {
    daemon: Daemon,
    dir: TempDir,
    backend: String,
}

impl Changing {
    fn start(dir: TempDir, backend: String) -> Changing {
        let settings = dir.path("vringd.toml");
        let args = ["run", "--core", "1", "--idle", "adaptive", "--config"];
        std::fs::write(&settings, text(&dir, &backend, "")).unwrap();
        let daemon = Daemon::start(&[&args[..], &[settings.to_str().unwrap()]].concat());
        Changing {
            daemon,
            dir,
            backend,
        }
    }

    /// Other faults, or none.
    fn change(&self, fault: &str) {
        let list = match fault {
            "" => String::new(),
            list => format!("fault = [\"{}\"]\n", list.replace('+', "\", \"")),
        };
        let settings = text(&self.dir, &self.backend, &list);
        std::fs::write(self.dir.path("vringd.toml"), settings).unwrap();
        let position = self.daemon.log().len();
        self.daemon.signal(libc::SIGHUP);
        let needle = match fault {
            "" => "no more faults are injected",
            _ => "faults are injected, as asked for",
        };
        self.daemon.wait_log_after(position, needle, PATIENCE);
    }

    fn counter(&self, name: &str) -> u64 {
        self.daemon.counter("disk0", name)
    }
}

fn text(dir: &TempDir, backend: &str, more: &str) -> String {
    let socket = dir.path("disk.sock");
    let socket = socket.display();
    format!("[[blk]]\nname = \"disk0\"\nsocket = \"{socket}\"\n{backend}\n{more}")
}

/// Posts four reads at once; the order in which they are answered.
fn four_reads<D: Driver>(front: &mut FrontEnd<D>, model: &[u8]) -> Vec<u64> {
    for place in 0..4 {
        front.post(place, IN, place * 8, &[], 4096);
    }
    let mut order = Vec::new();
    wait_until("four answers", PATIENCE, || {
        if let Some((place, answer)) = front.answered() {
            let at = usize::try_from(place).unwrap() * 4096;
            assert_eq!(answer.status, OK);
            assert_same("read", &answer.data, &model[at..at + 4096]);
            order.push(place);
        }
        (order.len() == 4).then_some(())
    });
    order
}

fn faults_come_and_go<D: Driver>(dir: TempDir, backend: String, mut model: Vec<u8>) {
    let disk = Changing::start(dir, backend);
    let mut front = FrontEnd::<D>::open(&disk.dir.path("disk.sock"), F_FLUSH);
    let mut write = |front: &mut FrontEnd<D>, seed: u64, want: u8| {
        let data = random_bytes(seed, 65536);
        assert_eq!(front.run(OUT, 0, &data, 0).status, want, "a write");
        if want == OK {
            model[..65536].copy_from_slice(&data);
        }
        let answer = front.run(IN, 0, &[], 65536);
        assert_eq!(answer.status, want, "a read");
        if want == OK {
            assert_same("read", &answer.data, &model[..65536]);
        }
    };
    write(&mut front, 1, OK);
    assert_eq!(disk.counter("injected"), 0);
    disk.change("eio=1");
    write(&mut front, 2, IOERR);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, IOERR);
    assert_eq!(disk.counter("injected"), 3);
    disk.change("short=1");
    write(&mut front, 3, OK);
    assert!(disk.counter("short_ios") > 2);
    disk.change("delay_us=150000");
    let begin = Instant::now();
    write(&mut front, 4, OK);
    assert!(begin.elapsed() >= Duration::from_millis(300), "two of them");
    disk.change("drop_flush");
    let before = disk.counter("injected");
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    assert_eq!(disk.counter("injected"), before + 1);
    // Nothing is lost when there are no more of them, and nobody waits for what was late.
    disk.change("delay_us=60000000+eagain=2");
    for place in 0..8 {
        front.post(place, IN, 0, &[], 512);
    }
    disk.change("");
    for (place, answer) in front.all_answers() {
        assert_eq!(answer.status, OK, "{place}");
    }
    let before = disk.counter("injected");
    write(&mut front, 5, OK);
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, OK);
    assert_eq!(disk.counter("injected"), before);
    disk.change("reorder=4");
    // A busy machine may be too slow for four to meet.
    let mut tries = 0;
    while four_reads(&mut front, &model) != [3, 2, 1, 0] {
        tries += 1;
        assert!(tries < 200, "they never change places");
    }
    assert!(!disk.daemon.log().contains("takes a restart"));
}

#[test]
fn faults_come_and_go_while_a_guest_runs() {
    let dir = TempDir::new("changing");
    faults_come_and_go::<PackedDriver>(dir, "backend = \"ram:8M\"".into(), vec![0; DISK]);
    let dir = TempDir::new("changing");
    let (path, model) = image(&dir);
    let backend = format!("path = \"{}\"", path.display());
    faults_come_and_go::<SplitDriver>(dir, backend, model);
}

/// `stuck` never answers; `well` does, and its guest is there, too.
fn never_answers<D: Driver>(backend: &str, idle: &str) {
    const STOP: Duration = Duration::from_secs(1);
    let (dir, late) = (TempDir::new("stuck"), ",io_timeout=100ms");
    let disk = |name: &str, keys: &str| {
        let socket = dir.path(&format!("{name}.sock"));
        format!("name={name},socket={},{keys}", socket.display())
    };
    let stuck = disk("stuck", &format!("{backend},fault=delay_us=60000000{late}"));
    let well = disk("well", "backend=ram:8M");
    let args = ["run", "--core", "1", "--stop-timeout", "1s", "--idle", idle];
    let daemon = Daemon::start(&[&args[..], &["--blk", &stuck, "--blk", &well]].concat());
    let mut front = two_queues::FrontEnd::<D>::open(&dir.path("stuck.sock"), F_FLUSH);
    let mut other = FrontEnd::<D>::open(&dir.path("well.sock"), F_FLUSH);
    let data = random_bytes(3, 4096);
    for (name, queue) in [(1, 0), (2, 1), (3, 1), (4, 0), (5, 1)] {
        front.submit(queue, name, OUT, u64::from(name) * 8, &data);
    }
    front.submit(0, 6, FLUSH, 0, &[]);
    wait_until("all are in flight", PATIENCE, || {
        (daemon.counter("stuck", "timeouts") == 6).then_some(())
    });
    assert_eq!(other.run(OUT, 0, &data, 0).status, OK);
    let begin = Instant::now();
    let (status, log) = daemon.stop();
    let took = begin.elapsed();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(took >= STOP, "it was not waited for: {took:?}");
    // An answer may come half a second later; one queue after the other would take three seconds.
    assert!(took < STOP * 3, "{took:?}: {log}");
    let told = |line: &str| assert!(log.contains(line), "{line:?} is not in {log}");
    told("blk stuck: not drained, 6 requests still in flight");
    told("stuck: vring 0: 3 requests still in flight after 1500 ms");
    told("stuck: vring 1: 3 requests still in flight after 1500 ms");
    assert!(!log.contains("blk well: not drained"), "{log}");
    assert!(!dir.path("stuck.sock").exists() && !dir.path("well.sock").exists());
}

#[test]
fn a_disk_that_never_answers_does_not_keep_the_daemon_from_ending() {
    never_answers::<SplitDriver>("backend=ram:8M", "adaptive");
    let dir = TempDir::new("stuck-file");
    let (path, _) = image(&dir);
    never_answers::<PackedDriver>(&format!("path={}", path.display()), "interrupt");
}
