//! Limits of disks of the real daemon, alone and in groups.
//!
//! How much passes is held against the time in which it passed in two ways. It is never more than
//! the rate and the burst allow: that holds however busy the machine is. And it is as much as the
//! rate gives, within 3 %, in one of a few spans: the burst makes up for what a busy machine takes
//! from within a span, but not from its end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use vringd::testing::driver::{PackedDriver, SplitDriver};

use super::front_end::{FrontEnd, IN, OUT, WRITE_ZEROES, range};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::TempDir;

const OK: u8 = 0;
const BLOCK: usize = 512;
const PATIENCE: Duration = Duration::from_secs(20);
/// Requests of one kind in flight at a disk.
const DEPTH: usize = 4;
const SPAN: Duration = Duration::from_secs(2);
const SPANS: usize = 5;

/// A daemon with disks whose settings can be written anew.
struct Disks {
    daemon: Daemon,
    dir: TempDir,
    names: Vec<&'static str>,
}

impl Disks {
    /// Each disk by its name and the lines of its limits; `groups` are tables.
    fn start(disks: &[(&'static str, &str)], groups: &str) -> Disks {
        Disks::start_on("1", disks, groups)
    }

    fn start_on(cores: &str, disks: &[(&'static str, &str)], groups: &str) -> Disks {
        let dir = TempDir::new("limits");
        let file = dir.path("vringd.toml");
        let names = disks.iter().map(|(name, _)| *name).collect();
        std::fs::write(&file, settings(&dir, disks, groups)).unwrap();
        let args = ["run", "--config", file.to_str().unwrap(), "--core", cores];
        let daemon = Daemon::start(&[&args[..], &["--idle", "adaptive"]].concat());
        Disks { daemon, dir, names }
    }

    /// Writes the settings anew and has the daemon read them; waits for `needle` in its log.
    fn change(&self, disks: &[(&'static str, &str)], groups: &str, needle: &str) {
        let text = settings(&self.dir, disks, groups);
        std::fs::write(self.dir.path("vringd.toml"), text).unwrap();
        let position = self.daemon.log().len();
        self.daemon.signal(libc::SIGHUP);
        self.daemon.wait_log_after(position, needle, PATIENCE);
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path(&format!("{name}.sock"))
    }

    fn counter(&self, disk: usize, name: &str) -> u64 {
        self.daemon.counter(self.names[disk], name)
    }
}

fn settings(dir: &TempDir, disks: &[(&'static str, &str)], groups: &str) -> String {
    let blk = |(name, limits): &(&str, &str)| {
        let socket = dir.path(&format!("{name}.sock"));
        format!(
            "[[blk]]\nname = \"{name}\"\nsocket = \"{}\"\nbackend = \"ram:8M\"\n{limits}\n",
            socket.display()
        )
    };
    groups.to_owned() + &disks.iter().map(blk).collect::<String>()
}

/// A guest that keeps [`DEPTH`] requests of each of its kinds at a disk.
struct Guest {
    front: FrontEnd<SplitDriver>,
    kinds: Vec<u32>,
    bytes: usize,
    done: Vec<u64>,
}

impl Guest {
    fn open(disks: &Disks, disk: usize, kinds: &[u32], bytes: usize) -> Guest {
        let mut front = FrontEnd::open(&disks.socket(disks.names[disk]), 0);
        for place in 0..kinds.len() * DEPTH {
            front.send(place, kinds[place % kinds.len()], bytes);
        }
        Guest {
            front,
            kinds: kinds.to_vec(),
            bytes,
            done: vec![0; kinds.len()],
        }
    }

    /// Takes what was answered, and asks for as much again.
    fn turn(&mut self) {
        while let Some((place, status)) = self.front.ended() {
            assert_eq!(status, OK);
            let kind = place % self.kinds.len();
            self.done[kind] += 1;
            self.front.send(place, self.kinds[kind], self.bytes);
        }
    }
}

/// Keeps the guests busy for `span`; how many requests of each kind each of them got done, and in
/// how many seconds.
fn run(guests: &mut [Guest], span: Duration) -> (Vec<Vec<u64>>, f64) {
    let count = |guests: &[Guest]| guests.iter().map(|guest| guest.done.clone()).collect();
    let before: Vec<Vec<u64>> = count(guests);
    let start = Instant::now();
    while start.elapsed() < span {
        guests.iter_mut().for_each(Guest::turn);
        std::thread::sleep(Duration::from_micros(300));
    }
    guests.iter_mut().for_each(Guest::turn);
    let seconds = start.elapsed().as_secs_f64();
    let mut after: Vec<Vec<u64>> = count(guests);
    for (after, before) in after.iter_mut().flatten().zip(before.iter().flatten()) {
        *after -= before;
    }
    (after, seconds)
}

/// The guests' requests pass at `want` per second, and after a pause what `burst` seconds give.
#[track_caller]
#[expect(clippy::cast_precision_loss, reason = "some thousand requests")]
fn pass_at(guests: &mut [Guest], want: &[&[f64]], burst: f64) {
    let want: Vec<f64> = want.concat();
    for span in 1.. {
        let (done, seconds) = run(guests, SPAN);
        let done: Vec<f64> = done.iter().flatten().map(|&count| count as f64).collect();
        // Each limit may let one pass on credit, and answers may have waited for us to begin.
        let waited = (1 + DEPTH) as f64 * want.len() as f64;
        let most = want.iter().sum::<f64>() * (seconds + burst) + waited;
        let all: f64 = done.iter().sum();
        assert!(all <= most, "{done:?} in {seconds} s at {want:?}");
        let near = |(done, want): (&f64, &f64)| (done / seconds - want).abs() <= want * 0.03;
        if done.iter().zip(&want).all(near) {
            return;
        }
        assert!(span < SPANS, "{done:?} in {seconds} s at {want:?}");
    }
}

#[test]
fn requests_and_bytes_pass_at_their_rates_reads_and_writes_apart() {
    let limits = [
        ("iops", "iops = 400\nrate_burst = \"500ms\""),
        (
            "apart",
            "read_iops = 500\nwrite_iops = \"300\"\nrate_burst = \"500ms\"",
        ),
        (
            "bytes",
            "read_bytes = \"2048k\"\nwrite_bytes = 1024000\nrate_burst = \"500ms\"",
        ),
        (
            "both",
            "iops = 1000\nbytes = 819200\nrate_burst = \"500ms\"",
        ),
    ];
    let disks = Disks::start(&limits, "");
    let mut guests = [
        Guest::open(&disks, 0, &[IN], BLOCK),
        Guest::open(&disks, 1, &[IN, OUT], BLOCK),
        Guest::open(&disks, 2, &[IN, OUT], 4096),
        Guest::open(&disks, 3, &[OUT], 4096),
    ];
    // What was saved up goes first.
    run(&mut guests, Duration::from_millis(100));
    let want: [&[f64]; 4] = [&[400.0], &[500.0, 300.0], &[500.0, 250.0], &[200.0]];
    pass_at(&mut guests, &want, 0.5);
    assert!(disks.counter(0, "throttled") > 0);
    assert!(disks.counter(0, "throttled_us") > 1_000_000);
    let (status, _) = disks.daemon.stop();
    assert!(
        status.success(),
        "a stop does not wait for limits: {status}"
    );
}

#[test]
fn a_group_is_shared_by_disks_of_two_workers() {
    let group = "[[group]]\nname = \"g\"\niops = 600\nrate_burst = \"500ms\"\n";
    let on = [
        ("one", "group = \"g\"\ncores = [0]"),
        ("two", "group = \"g\"\ncores = [1]"),
    ];
    let disks = Disks::start_on("0,1", &on, group);
    let mut guests = [
        Guest::open(&disks, 0, &[IN], BLOCK),
        Guest::open(&disks, 1, &[OUT], BLOCK),
    ];
    run(&mut guests, Duration::from_millis(100));
    for span in 1.. {
        let (done, seconds) = run(&mut guests, SPAN);
        let [one, two] = [&done[0], &done[1]].map(|done| u32::try_from(done[0]).unwrap());
        let all = f64::from(one + two);
        assert!(
            all <= 600.0 * (seconds + 1.0) + 10.0,
            "{all} in {seconds} s"
        );
        // Whose turn it is is a hint between workers, and a busy machine delays one more than the
        // other; the sum is exact all the same.
        assert!(one.min(two) > (one + two) / 10, "{one} and {two}");
        if (all / seconds - 600.0).abs() <= 600.0 * 0.03 {
            return;
        }
        assert!(span < SPANS, "{all} in {seconds} s");
    }
}

#[test]
fn a_group_is_shared_and_rates_and_groups_change_while_guests_run() {
    let group =
        |iops: u32| format!("[[group]]\nname = \"g\"\niops = {iops}\nrate_burst = \"500ms\"\n");
    let [one, two] = [("one", "group = \"g\""), ("two", "group = \"g\"")];
    let disks = Disks::start(&[one, two], &group(1));
    let mut guests = [
        Guest::open(&disks, 0, &[IN], BLOCK),
        Guest::open(&disks, 1, &[OUT], BLOCK),
    ];
    // The worker sleeps until the first of these may pass at the new rate, not at the old.
    disks.change(&[one, two], &group(600), "group g: other rates");
    pass_at(&mut guests, &[&[300.0], &[300.0]], 1.0);
    let own = ("two", "iops = 100\nrate_burst = \"500ms\"");
    disks.change(&[one, own], &group(400), "blk two: now in no group");
    pass_at(&mut guests, &[&[400.0], &[100.0]], 1.0);
    disks.change(&[("one", ""), own], &group(400), "blk one: now in no group");
    let before = guests[0].done[0];
    wait_until("a disk without a limit is not slow", PATIENCE, || {
        guests.iter_mut().for_each(Guest::turn);
        (guests[0].done[0] > before + 5000).then_some(())
    });
    let log = disks.daemon.log();
    assert!(!log.contains("takes a restart"), "{log}");
    let other = ("two", "group = \"new\"");
    let new = group(400) + "[[group]]\nname = \"new\"\n";
    disks.change(
        &[("one", ""), other],
        &new,
        "group new: new groups take a restart",
    );
    // Wrong settings change nothing.
    disks.change(&[("one", ""), other], "", "there is no group \"new\"");
}

#[test]
fn nothing_that_waits_for_a_limit_is_lost_or_delays_a_stop() {
    let disks = Disks::start(&[("slow", "bytes = 1\nrate_burst = \"1ms\"")], "");
    for _ in 0..2 {
        let mut front = FrontEnd::<PackedDriver>::open(&disks.socket("slow"), 0);
        let before = disks.counter(0, "throttled");
        // What passes is paid for in hours.
        for place in 0..8 {
            front.send(place, OUT, BLOCK);
        }
        wait_until("one waits", PATIENCE, || {
            (disks.counter(0, "throttled") > before).then_some(())
        });
        let start = Instant::now();
        let base = front.base();
        assert!(start.elapsed() < PATIENCE / 2, "the stop waited");
        let mut answered = 0;
        while let Some((_, status)) = front.ended() {
            assert_eq!(status, OK);
            answered += 1;
        }
        assert_eq!(base & 0x7fff, 3 * answered, "the others stay in the ring");
    }
    // The next guest is let off when the limit goes, and sees what was written.
    let mut front = FrontEnd::<SplitDriver>::open(&disks.socket("slow"), 1 << 14);
    front.send(0, IN, BLOCK);
    disks.change(&[("slow", "")], "", "blk slow: other rates");
    let answer = wait_until("it is answered", PATIENCE, || front.ended());
    assert_eq!(answer, (0, OK));
    let zeroed = front.run(WRITE_ZEROES, 0, &range(0, 8, 0), 0);
    assert_eq!(zeroed.status, OK);
    assert_eq!(front.run(IN, 0, &[], 4096).data, vec![0; 4096]);
}

#[test]
fn a_worker_sleeps_while_requests_wait_for_a_limit() {
    let disks = Disks::start(&[("slow", "iops = 20\nrate_burst = \"1s\"")], "");
    let mut guests = [Guest::open(&disks, 0, &[IN], BLOCK)];
    run(&mut guests, Duration::from_millis(200));
    let share = disks.daemon.cpu_share(Duration::from_millis(500));
    // Ten times to wake up, and 100 µs each until it sleeps again.
    assert!(share < 0.2, "{share} of a core");
}

#[test]
fn a_quiet_disk_goes_on_while_a_noisy_one_waits_for_its_limit() {
    let disks = Disks::start(&[("noisy", "iops = 20"), ("quiet", "")], "");
    let start = Instant::now();
    let mut noisy = Guest::open(&disks, 0, &[IN, OUT], BLOCK);
    let mut quiet = Guest::open(&disks, 1, &[IN], BLOCK);
    // Did it wait with the other, it would take a minute.
    while quiet.done[0] < 5000 {
        noisy.turn();
        quiet.turn();
        assert!(start.elapsed() < PATIENCE, "{} requests", quiet.done[0]);
        std::thread::yield_now();
    }
    wait_until("the noisy disk waits", PATIENCE, || {
        noisy.turn();
        (disks.counter(0, "throttled") > 0).then_some(())
    });
    assert_eq!(disks.counter(1, "throttled"), 0);
    let done: u64 = noisy.done.iter().sum();
    let most = 20.0 * (start.elapsed().as_secs_f64() + 0.1) + 1.0;
    #[expect(clippy::cast_precision_loss, reason = "a few requests")]
    let done = done as f64;
    assert!(done <= most, "{done} of {most}");
}

/// Latencies of a quiet disk beside a noisy one with these limits, in microseconds: 50th, 99th and
/// 99.9th percentile. One thread is both guests, so that it measures the daemon and not itself.
fn quiet_latency(noisy: Option<&str>) -> [f64; 3] {
    const NOISY_DEPTH: usize = 64;
    let limits = noisy.unwrap_or_default();
    let disks = Disks::start(&[("noisy", limits), ("quiet", "")], "");
    let mut loud = FrontEnd::<SplitDriver>::open(&disks.socket("noisy"), 0);
    for place in 0..NOISY_DEPTH * usize::from(noisy.is_some()) {
        loud.send(place, IN, 8192);
    }
    let mut quiet = FrontEnd::<SplitDriver>::open(&disks.socket("quiet"), 0);
    let mut micros = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let posted = Instant::now();
        quiet.send(0, IN, BLOCK);
        while quiet.ended().is_none() {
            std::hint::spin_loop();
        }
        micros.push(posted.elapsed().as_secs_f64() * 1e6);
        while let Some((place, _)) = loud.ended() {
            loud.send(place, IN, 8192);
        }
    }
    // What was saved up is not what is asked about.
    let mut micros = micros.split_off(micros.len() / 5);
    micros.sort_by(f64::total_cmp);
    [500, 990, 999].map(|part| micros[micros.len() * part / 1000])
}

/// The 99th percentile that docs/operations.md says limits keep, in microseconds.
const QUIET_P99: f64 = 10.0;

#[test]
#[ignore = "a measurement, for docs/operations.md: scripts/soak limits"]
fn measure_a_quiet_disk_beside_a_noisy_one() {
    let measure = |what: &str, noisy: Option<&str>| {
        let [half, most, nearly_all] = quiet_latency(noisy);
        println!("{what}: p50 {half:.1} p99 {most:.1} p99.9 {nearly_all:.1} µs");
        most
    };
    measure("alone", None);
    let unlimited = measure("beside one without a limit", Some(""));
    // Otherwise the disk is not noisy enough for anything to be seen.
    assert!(unlimited > QUIET_P99, "{unlimited} µs without a limit");
    for limit in ["iops = 20000", "iops = 2000"] {
        // A busy machine only ever adds to it.
        let kept = (0..SPANS).any(|_| measure(limit, Some(limit)) <= QUIET_P99);
        assert!(kept, "{limit}: the 99th percentile is above {QUIET_P99} µs");
    }
}

#[test]
#[ignore = "ten seconds and more, for docs/performance.md: scripts/soak limits"]
#[expect(clippy::cast_precision_loss, reason = "some ten thousand requests")]
fn measure_rates_over_ten_seconds() {
    let group = "[[group]]\nname = \"g\"\niops = 3000\n";
    let limits = [
        ("iops", "iops = 1000"),
        ("apart", "read_iops = 2000\nwrite_iops = 500"),
        ("bytes", "bytes = \"8M\""),
        ("one", "group = \"g\""),
        ("two", "group = \"g\""),
    ];
    let disks = Disks::start(&limits, group);
    let mut guests = [
        Guest::open(&disks, 0, &[IN], BLOCK),
        Guest::open(&disks, 1, &[IN, OUT], BLOCK),
        Guest::open(&disks, 2, &[OUT], 4096),
        Guest::open(&disks, 3, &[IN], BLOCK),
        Guest::open(&disks, 4, &[OUT], BLOCK),
    ];
    // Which of the counts, and what they are together.
    let want = [
        ("iops", 0..1, 1000.0),
        ("read_iops", 1..2, 2000.0),
        ("write_iops", 2..3, 500.0),
        ("bytes", 3..4, 8e6 / 4096.0),
        ("iops of a group of two", 4..6, 3000.0),
    ];
    // What was saved up goes first.
    run(&mut guests, Duration::from_millis(200));
    for span in 1.. {
        let (done, seconds) = run(&mut guests, Duration::from_secs(10));
        let done: Vec<u64> = done.concat();
        let mut worst = 0.0_f64;
        for (what, counts, want) in want.clone() {
            let rate = done[counts].iter().sum::<u64>() as f64 / seconds;
            let off = (rate / want - 1.0) * 100.0;
            println!("{what}: {rate:.1} of {want:.1} per second, {off:+.2} % in {seconds:.1} s");
            worst = worst.max(off.abs());
        }
        if worst <= 3.0 {
            return;
        }
        // As in the short spans: a busy machine takes from the end of one.
        assert!(span < SPANS, "{worst:.2} % off");
    }
}
