//! Network back-ends, and the loads that testpmd puts on them, for `rings` and `net`.
#![allow(dead_code, reason = "each bench uses its part")]

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use crate::testpmd::{RingPath, Testpmd, TestpmdConfig};
use crate::turns::{BACK_END_CORE, BenchDir};

/// Traffic before the measurement, in which caches and batches settle.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);

/// How long a back-end may take to be there, and to say what it has counted.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What the back-end does with frames.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// Gives them back.
    Echo,
    /// Gives those of each of two ports to the other.
    Wire,
    Switch,
}

impl Link {
    pub(crate) fn parse(name: &str) -> Result<Self, String> {
        match name {
            "echo" => Ok(Self::Echo),
            "wire" => Ok(Self::Wire),
            "switch" => Ok(Self::Switch),
            _ => Err(format!("--link is echo, wire or switch, not {name:?}")),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Wire => "wire",
            Self::Switch => "switch",
        }
    }

    /// How many ports it has.
    fn ports(self) -> usize {
        if self == Self::Echo { 1 } else { 2 }
    }

    /// Paths for its ports' sockets, where nothing is.
    pub(crate) fn sockets(self, dir: &BenchDir) -> Vec<PathBuf> {
        let first = dir.fresh_socket();
        let second = first.with_extension("second");
        let _ = std::fs::remove_file(&second);
        [first, second][..self.ports()].to_vec()
    }

    /// The ports' options for vringd.
    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Self::Echo => &["link=echo"],
            Self::Wire => &["link=wire:net1", "queues=16"],
            Self::Switch => &["link=switch:sw", "link=switch:sw"],
        }
    }
}

/// A back-end; ended when dropped.
pub(crate) enum BackEnd {
    Vringd(Child, Log),
    /// With its looks at its ports so far.
    Dpdk(Testpmd, [u64; 2]),
}

/// What vringd logs, line by line.
pub(crate) struct Log(Receiver<String>);

impl Log {
    /// What comes through `pipe`; what is worse than news is passed on.
    fn of(pipe: ChildStderr) -> Self {
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if !line.contains(" INFO ") {
                    eprintln!("{line}");
                }
                // The bench may have ended.
                let _ = send.send(line);
            }
        });
        Self(lines)
    }
}

impl BackEnd {
    /// vringd by a command that becomes it, with a port of these options on each socket.
    pub(crate) fn vringd(
        mut command: Command,
        idle: &str,
        options: &[&str],
        sockets: &[PathBuf],
    ) -> Self {
        let core = BACK_END_CORE.to_string();
        command.args(["run", "--log-level", "info", "--core", &core]);
        command.args(["--idle", idle]);
        for (port, (options, socket)) in options.iter().zip(sockets).enumerate() {
            let socket = socket.display();
            command.args([
                "--net",
                &format!("name=net{port},socket={socket},{options}"),
            ]);
        }
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.expect("vringd was built with this bench");
        let log = Log::of(child.stderr.take().expect("a pipe"));
        Self::Vringd(child, log).once_there(sockets)
    }

    /// The turns of vringd's worker so far, or testpmd's looks at its ports: those that moved
    /// something, and those that did not.
    pub(crate) fn turns(&mut self) -> Option<[u64; 2]> {
        let (child, log) = match self {
            Self::Vringd(child, log) => (child, log),
            Self::Dpdk(testpmd, so_far) => {
                let answer = testpmd.cmd("show fwd stats all");
                testpmd.cmd("clear fwd stats all");
                let [busy, empty] = looks(&answer)?;
                *so_far = [so_far[0] + busy, so_far[1] + empty];
                return Some(*so_far);
            }
        };
        let pid = child.id().to_string();
        let asked = Command::new("kill").args(["-USR1", &pid]).status();
        assert!(asked.expect("kill runs").success(), "no signal to {pid}");
        let line = loop {
            let line = log.0.recv_timeout(START_TIMEOUT).expect("counters");
            if line.contains("counters worker=0 ") {
                break line;
            }
        };
        let count = |name: &str| {
            let mut words = line.split_whitespace();
            let value = words.find_map(|word| word.strip_prefix(name));
            value.and_then(|value| value.parse().ok())
        };
        Some([count("busy_turns=")?, count("empty_turns=")?])
    }

    /// DPDK's.
    pub(crate) fn dpdk(config: &TestpmdConfig, sockets: &[PathBuf]) -> Self {
        let mut testpmd = Testpmd::start(config);
        // For `turns`: it counts a look by its size, one addition more.
        testpmd.cmd("set record-burst-stats on");
        Self::Dpdk(testpmd, [0; 2]).once_there(sockets)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        match self {
            Self::Vringd(child, _) => child.id(),
            Self::Dpdk(testpmd, _) => testpmd.pid(),
        }
    }

    fn once_there(mut self, sockets: &[PathBuf]) -> Self {
        let deadline = Instant::now() + START_TIMEOUT;
        while let Some(socket) = sockets.iter().find(|socket| !socket.exists()) {
            let ended = match &mut self {
                Self::Vringd(child, _) => child.try_wait().expect("a child of ours"),
                Self::Dpdk(..) => None,
            };
            let in_time = ended.is_none() && Instant::now() < deadline;
            assert!(in_time, "no socket at {}: {ended:?}", socket.display());
            thread::yield_now();
        }
        self
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if let Self::Vringd(child, _) = self {
            // Nothing is at stake: its socket goes with the directory.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The looks that found frames and those that found none, in what testpmd tells of its ports:
/// `RX-bursts : 1000 [75% of 0 pkts + 25% of 32 pkts]`, percents being whole.
fn looks(answer: &str) -> Option<[u64; 2]> {
    let lines = answer
        .lines()
        .filter_map(|line| line.split_once("RX-bursts :"));
    let mut sum = None;
    for (_, line) in lines {
        let (all, shares) = line.trim().split_once(' ')?;
        let all: u64 = all.parse().ok()?;
        let none = shares.trim_start_matches('[').split_once("% of 0 pkts");
        let percent = none.map_or(Some(0), |(percent, _)| percent.parse().ok())?;
        let empty = all * percent / 100;
        let [busy, before] = sum.unwrap_or_default();
        sum = Some([busy + all - empty, before + empty]);
    }
    sum
}

/// DPDK's back-end on these sockets; of two ports, each gives its frames to the other.
pub(crate) fn vhost(sockets: &[PathBuf]) -> TestpmdConfig {
    let mut config = TestpmdConfig::vhost_echo(BACK_END_CORE, &sockets[0], 1);
    for (port, socket) in sockets.iter().enumerate().skip(1) {
        let socket = socket.display();
        let vdev = format!("net_vhost{port},iface={socket},queues=1");
        config.vdevs.push(vdev);
    }
    config
}

/// A front-end on each socket, in one testpmd; of two, each gives its frames to the other.
fn front_end(path: &RingPath, sockets: &[PathBuf], listens: bool) -> TestpmdConfig {
    let mut config = path.front_end(&sockets[0]);
    for (port, socket) in sockets.iter().enumerate().skip(1) {
        let other = path.front_end(socket).vdevs.remove(0);
        let other = other.replace("net_virtio_user0", &format!("net_virtio_user{port}"));
        config
            .vdevs
            .push(other.replace("04:05,", &format!("04:1{port},")));
    }
    if sockets.len() > 1 {
        // Each sends to the other's address, which a switch has seen.
        config.app("--eth-peer=0,00:01:02:03:04:11");
        config.app("--eth-peer=1,00:01:02:03:04:05");
    }
    if listens {
        config
            .vdevs
            .iter_mut()
            .for_each(|vdev| *vdev += ",server=1");
    }
    config
}

/// Million frames per second.
#[derive(Clone, Copy)]
pub(crate) struct Mpps(pub(crate) f64);

impl fmt::Display for Mpps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} Mpps", self.0)
    }
}

/// What a front-end puts on a back-end, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) path: &'a RingPath,
    /// Bytes of a frame.
    pub(crate) size: u32,
    /// Frames in flight: up to 32, or a multiple of it.
    pub(crate) frames: u32,
    pub(crate) time: Duration,
    /// The front-end listens, for a back-end that connects.
    pub(crate) listens: bool,
}

/// Frames per second of a back-end that sends all back, be it from port to port: all that the
/// front-end's ports receive. The back-end is whatever ends when it is dropped.
pub(crate) fn looped<B>(back_end: B, sockets: &[PathBuf], load: Load<'_>) -> Mpps {
    looped_between(back_end, sockets, load, |_| ()).0
}

/// The same, and what `look` says of the back-end at the beginning and at the end.
#[expect(
    clippy::cast_precision_loss,
    reason = "frames per second are far below 2^53"
)]
pub(crate) fn looped_between<B, T>(
    mut back_end: B,
    sockets: &[PathBuf],
    load: Load<'_>,
    look: impl Fn(&mut B) -> T,
) -> (Mpps, [T; 2]) {
    let mut front_end = Testpmd::start(&front_end(load.path, sockets, load.listens));
    front_end.start_frames(&load.size.to_string(), load.frames);
    thread::sleep(WARM_UP);
    // The rate in an answer is that since the question before; looking is not part of it.
    let ports = 0..sockets.len();
    let before = look(&mut back_end);
    let warm: Vec<_> = ports.clone().map(|port| front_end.stats(port)).collect();
    thread::sleep(load.time);
    let mut rate = 0;
    for (port, warm) in ports.zip(warm) {
        let stats = front_end.stats(port);
        let goes_on = stats.rx_packets > warm.rx_packets;
        assert!(goes_on, "traffic stopped: {stats:?}");
        rate += stats.rx_pps;
    }
    let looks = [before, look(&mut back_end)];
    front_end.quit();
    drop(back_end);
    (Mpps(rate as f64 / 1e6), looks)
}

/// Frames per second that a back-end takes from a front-end which only sends: those that arrive at
/// an interface of the back-end's network namespace.
#[expect(clippy::cast_precision_loss, reason = "frames are far below 2^53")]
pub(crate) fn flooded(back_end: BackEnd, socket: &Path, load: Load<'_>, interface: &str) -> Mpps {
    let pid = back_end.pid();
    let mut front_end = Testpmd::start(&load.path.front_end(socket));
    front_end.cmd("set fwd txonly");
    front_end.cmd(&format!("set txpkts {}", load.size));
    front_end.cmd("start");
    thread::sleep(WARM_UP);
    let (start, before) = (Instant::now(), received(pid, interface));
    thread::sleep(load.time);
    let frames = received(pid, interface) - before;
    let time = start.elapsed();
    assert!(frames > 0, "no frame arrives at {interface}");
    front_end.stop();
    front_end.quit();
    drop(back_end);
    Mpps(frames as f64 / time.as_secs_f64() / 1e6)
}

/// Frames per second that a front-end which only receives gets from a back-end to whose interface
/// `generator` sends them, and those that arrive at the interface.
#[expect(clippy::cast_precision_loss, reason = "frames are far below 2^53")]
pub(crate) fn fed(
    back_end: BackEnd,
    socket: &Path,
    load: Load<'_>,
    interface: &str,
    generator: &mut Command,
) -> [Mpps; 2] {
    let pid = back_end.pid();
    let mut front_end = Testpmd::start(&load.path.front_end(socket));
    front_end.cmd("set fwd rxonly");
    front_end.cmd("start");
    let generator = generator.stdin(Stdio::null()).spawn();
    let mut generator = generator.expect("the generator can be started");
    thread::sleep(WARM_UP);
    let (start, arrived) = (Instant::now(), received(pid, interface));
    let got = front_end.stats(0).rx_packets;
    thread::sleep(load.time);
    let got = front_end.stats(0).rx_packets - got;
    let arrived = received(pid, interface) - arrived;
    let time = start.elapsed();
    let ended = generator.try_wait().expect("a child of ours");
    assert!(ended.is_none(), "the generator ended: {ended:?}");
    let _ = generator.kill();
    let _ = generator.wait();
    assert!(
        got > 0,
        "no frame comes from {interface}, where {arrived} arrived"
    );
    front_end.stop();
    front_end.quit();
    drop(back_end);
    [got, arrived].map(|frames| Mpps(frames as f64 / time.as_secs_f64() / 1e6))
}

/// How many frames an interface in a process's network namespace has received.
fn received(pid: u32, interface: &str) -> u64 {
    let path = format!("/proc/{pid}/net/dev");
    let table = std::fs::read_to_string(&path).expect("the back-end runs");
    let name = format!("{interface}:");
    let line = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(&name));
    let packets = line.and_then(|line| line.split_whitespace().nth(1));
    let packets = packets.and_then(|packets| packets.parse().ok());
    packets.unwrap_or_else(|| panic!("no {interface} in {path}: {table}"))
}
