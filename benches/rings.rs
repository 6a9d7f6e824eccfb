//! How many frames per second the `echo` link moves, beside DPDK's own `net_vhost`, in turns.
//!
//! One front-end (testpmd's `net_virtio_user` on core 0, one queue of 1024, every ring full) is
//! given vringd and DPDK's back-end on core 1 alternately. Each run stands between two
//! measurements of the cache-line round trip between the cores; runs that were disturbed, and
//! pairs whose runs were not made under the same conditions, are thrown away. What carries over
//! to other machines is the ratio; the absolute figures stand beside it.
//!
//! `scripts/bench rings [PATH…] [--pairs N] [--size BYTES] [--seconds S] [--null]`, where a PATH
//! is the number of a ring path. `--null` puts DPDK in vringd's place as well: the ratio must
//! then be 1, and how far it is from that is how far the method errs. `--against BINARY` puts
//! another build of vringd in DPDK's place. `--bursts N` sets the frames in flight, 32 each.
//! `--link wire` and `--link switch` join two ports instead, whose front-ends one testpmd loops:
//! both directions are counted together, and DPDK forwards between two `net_vhost` ports. `--write`
//! measures all ten paths at 64, 256 and 1518 bytes and puts table and chart into
//! docs/performance.md.

#[path = "support/chart.rs"]
mod chart;
#[path = "../tests/support/testpmd.rs"]
mod testpmd;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use testpmd::{RingPath, Testpmd, TestpmdConfig};
use turns::{BACK_END_CORE, BenchDir, Run, Turns, in_turns, median};
use vringd::testing::probe::ProbeError;

/// Traffic before the measurement, in which caches and batches settle.
const WARM_UP: Duration = Duration::from_millis(500);

/// How long a back-end may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What the back-end does with frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Link {
    /// Gives them back.
    Echo,
    /// Gives them to another port.
    Wire,
    Switch,
}

impl Link {
    fn parse(name: Option<String>) -> Result<Self, String> {
        match name.as_deref() {
            Some("echo") => Ok(Self::Echo),
            Some("wire") => Ok(Self::Wire),
            Some("switch") => Ok(Self::Switch),
            other => Err(format!("--link is echo, wire or switch, not {other:?}")),
        }
    }

    /// How many ports it has.
    fn ports(self) -> usize {
        if self == Self::Echo { 1 } else { 2 }
    }

    /// The ports' options for vringd, without name and socket.
    fn options(self, port: usize) -> &'static str {
        match (self, port) {
            (Self::Echo, _) => "link=echo",
            (Self::Wire, 0) => "link=wire:net1",
            (Self::Wire, _) => "queues=16",
            (Self::Switch, _) => "link=switch:sw",
        }
    }
}

/// What the command line asks for.
struct Options {
    link: Link,
    paths: Vec<RingPath>,
    pairs: usize,
    sizes: Vec<u32>,
    /// Put the results into the documentation.
    write: bool,
    seconds: Duration,
    null: bool,
    against: Option<PathBuf>,
    /// Bursts of 32 frames in flight: 32 fill a ring of 1024.
    bursts: u32,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            link: Link::Echo,
            paths: Vec::new(),
            pairs: 5,
            sizes: vec![64],
            write: false,
            seconds: Duration::from_secs(1),
            null: false,
            against: None,
            bursts: 32,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            if arg == "--against" {
                options.against = args.next().map(PathBuf::from);
                continue;
            }
            if arg == "--link" {
                options.link = Link::parse(args.next())?;
                continue;
            }
            let mut value = || {
                let value = args.next().unwrap_or_default();
                let number = value.parse::<u32>().ok().filter(|&number| number > 0);
                number.ok_or(format!("{arg} takes a number above 0, not {value:?}"))
            };
            match arg.as_str() {
                "--pairs" => options.pairs = value()? as usize,
                "--size" => options.sizes = vec![value()?],
                "--seconds" => options.seconds = Duration::from_secs(value()?.into()),
                "--bursts" => options.bursts = value()?,
                "--write" => options.write = true,
                "--null" => options.null = true,
                // Added by cargo.
                "--bench" => {}
                other => options
                    .paths
                    .push(
                        other
                            .parse()
                            .ok()
                            .and_then(RingPath::number)
                            .ok_or(format!(
                                "{other:?} is neither an option nor a path, 1 to 10"
                            ))?,
                    ),
            }
        }
        if options.write {
            options.paths = (1..=10).filter_map(RingPath::number).collect();
            options.sizes = vec![64, 256, 1518];
        }
        if options.paths.is_empty() {
            options.paths = [1, 5].into_iter().filter_map(RingPath::number).collect();
        }
        if let Some(size) = options
            .sizes
            .iter()
            .find(|size| !(60..=1518).contains(*size))
        {
            return Err(format!("--size is 60 to 1518 bytes, not {size}"));
        }
        Ok(options)
    }

    /// The back-end that stands first in each pair.
    fn ours(&self) -> Peer {
        if self.null { Peer::Dpdk } else { Peer::Vringd }
    }

    /// The back-end that it is compared with.
    fn theirs(&self) -> Peer {
        match self.against {
            Some(_) => Peer::Other,
            None => Peer::Dpdk,
        }
    }

    /// How a back-end is called in the table.
    fn name(&self, peer: Peer) -> String {
        match (peer, &self.against) {
            (Peer::Other, Some(binary)) => binary.display().to_string(),
            (Peer::Vringd, _) => "vringd".into(),
            _ => "net_vhost".into(),
        }
    }
}

/// Whose back-end is measured.
#[derive(Clone, Copy)]
enum Peer {
    Vringd,
    Dpdk,
    /// Another build of vringd.
    Other,
}

/// A back-end that sends every frame back; ended when dropped.
enum BackEnd {
    Vringd(Child),
    Dpdk {
        #[expect(dead_code, reason = "held for what its drop does")]
        testpmd: Testpmd,
    },
}

impl BackEnd {
    fn start(peer: Peer, options: &Options, sockets: &[PathBuf]) -> Self {
        let this = PathBuf::from(env!("CARGO_BIN_EXE_vringd"));
        let back_end = match peer {
            Peer::Vringd | Peer::Other => {
                let other = options.against.as_ref();
                let binary = other
                    .filter(|_| matches!(peer, Peer::Other))
                    .unwrap_or(&this);
                let core = BACK_END_CORE.to_string();
                let mut command = Command::new(binary);
                command.args([
                    "run",
                    "--log-level",
                    "warn",
                    "--core",
                    &core,
                    "--idle",
                    "spin",
                ]);
                for (port, socket) in sockets.iter().enumerate() {
                    let link = options.link.options(port);
                    let socket = socket.display();
                    command.args(["--net", &format!("name=net{port},socket={socket},{link}")]);
                }
                let child = command
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .spawn()
                    .expect("vringd was built with this bench");
                Self::Vringd(child)
            }
            Peer::Dpdk => Self::Dpdk {
                testpmd: Testpmd::start(&vhost(sockets)),
            },
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while let Some(socket) = sockets.iter().find(|socket| !socket.exists()) {
            let in_time = Instant::now() < deadline;
            assert!(in_time, "no socket at {}", socket.display());
            thread::yield_now();
        }
        back_end
    }
}

/// DPDK's back-end on these sockets; of two ports, each gives its frames to the other.
fn vhost(sockets: &[PathBuf]) -> TestpmdConfig {
    let mut config = TestpmdConfig::vhost_echo(BACK_END_CORE, &sockets[0], 1);
    for (port, socket) in sockets.iter().enumerate().skip(1) {
        let socket = socket.display();
        let vdev = format!("net_vhost{port},iface={socket},queues=1");
        config.vdevs.push(vdev);
    }
    config
}

/// A front-end on each socket, in one testpmd; of two, each gives its frames to the other.
fn front_end(path: &RingPath, sockets: &[PathBuf]) -> TestpmdConfig {
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
    config
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if let Self::Vringd(child) = self {
            // Nothing is at stake: its socket goes with the directory.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Million frames per second.
#[derive(Clone, Copy)]
struct Mpps(f64);

impl fmt::Display for Mpps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} Mpps", self.0)
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "frames per second are far below 2^53"
)]
fn run(peer: Peer, path: &RingPath, size: u32, options: &Options, dir: &BenchDir) -> Mpps {
    let first = dir.fresh_socket();
    let second = first.with_extension("second");
    let _ = std::fs::remove_file(&second);
    let sockets = &[first, second][..options.link.ports()];
    let back_end = BackEnd::start(peer, options, sockets);
    let mut front_end = Testpmd::start(&front_end(path, sockets));
    front_end.start_traffic(&size.to_string(), options.bursts);
    thread::sleep(WARM_UP);
    // The rate in an answer is that since the question before.
    let ports = 0..options.link.ports();
    let warm: Vec<_> = ports.clone().map(|port| front_end.stats(port)).collect();
    thread::sleep(options.seconds);
    let mut rate = 0;
    for (port, warm) in ports.zip(warm) {
        let stats = front_end.stats(port);
        let goes_on = stats.rx_packets > warm.rx_packets;
        assert!(goes_on, "traffic stopped: {stats:?}");
        rate += stats.rx_pps;
    }
    front_end.quit();
    drop(back_end);
    Mpps(rate as f64 / 1e6)
}

/// Runs both in turns.
fn pairs(
    path: &RingPath,
    size: u32,
    options: &Options,
    dir: &BenchDir,
) -> Result<Vec<Turns<Mpps>>, ProbeError> {
    let peers = [options.ours(), options.theirs()];
    let names = peers.map(|peer| options.name(peer));
    let what = format!("path {}, {size} bytes", path.number);
    in_turns(&what, options.pairs, &names, |peer| {
        Run::between_probes(|| run(peers[peer], path, size, options, dir))
    })
}

/// A line of the table.
struct Row {
    path: String,
    size: u32,
    distance: &'static str,
    probe_ns: f64,
    /// Medians of both, in Mpps.
    mpps: [f64; 2],
    ratio: f64,
    range: (f64, f64),
    pairs: usize,
}

impl Row {
    fn new(path: &RingPath, size: u32, pairs: &Turns<Mpps>) -> Self {
        let (ratio, range) = pairs.ratio(|mpps| mpps.0);
        Self {
            path: format!("{} {}", path.number, path.name),
            size,
            distance: pairs.distance.name(),
            probe_ns: pairs.probe_ns(),
            mpps: [0, 1].map(|peer| median(pairs.values(peer, |mpps| mpps.0))),
            ratio,
            range,
            pairs: pairs.runs.len(),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {} | {} | {:.1} | {:.1} | {:.2} ({:.2}–{:.2}) | {} | {}, {:.0} ns |",
            self.path,
            self.size,
            self.mpps[0],
            self.mpps[1],
            self.ratio,
            self.range.0,
            self.range.1,
            self.pairs,
            self.distance,
            self.probe_ns,
        )
    }
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = BenchDir::new(&std::env::temp_dir())?;
    let mut rows = Vec::new();
    let mut complete = true;
    for &size in &options.sizes {
        for path in &options.paths {
            let by_distance = pairs(path, size, options, &dir)?;
            complete &= by_distance.iter().any(|c| c.runs.len() >= options.pairs);
            let seen = by_distance.iter().filter(|c| !c.runs.is_empty());
            rows.extend(seen.map(|class| Row::new(path, size, class)));
        }
    }
    let table = table(options, &rows);
    print!("{table}");
    if options.write {
        write_docs(&table, &rows, options.pairs)?;
    }
    Ok(complete)
}

fn table(options: &Options, rows: &[Row]) -> String {
    let [ours, theirs] = [options.ours(), options.theirs()].map(|peer| options.name(peer));
    let mut table = format!(
        "| path | bytes | {ours}, Mpps | {theirs}, Mpps | ratio (range) | pairs | probe |\n\
         |---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        table.push_str(&format!("{row}\n"));
    }
    table
}

/// Puts table and chart into docs/performance.md. The chart has the rows with all pairs: the others
/// say what was seen in passing.
fn write_docs(table: &str, rows: &[Row], pairs: usize) -> Result<(), String> {
    let bars: Vec<_> = rows
        .iter()
        .filter(|row| row.pairs >= pairs)
        .map(|row| chart::Bar {
            panel: format!("{} bytes", row.size),
            label: format!("{} ({})", row.path, row.distance),
            ratio: row.ratio,
            range: row.range,
        })
        .collect();
    let title = "Frames per second, vringd / net_vhost";
    turns::write_docs("rings", table, &chart::svg(title, &bars))
}

fn main() -> ExitCode {
    // Without this cargo is testing, not benchmarking: that it builds is all there is to test.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("rings: {message}");
            return ExitCode::from(2);
        }
    };
    match bench(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("rings: too many runs were disturbed: some pairs are missing");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("rings: {error}");
            ExitCode::FAILURE
        }
    }
}
