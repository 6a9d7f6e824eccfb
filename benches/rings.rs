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
//! another build of vringd in DPDK's place. `--frames N[,N…]` sets the frames in flight; with one,
//! its round trip is what is measured. `--size mix` has `vringd bench net` for a front-end, which
//! sends 7 frames of 64 bytes, 4 of 590 and 1 of 1518 in rotation. `--link wire` and `--link
//! switch` join two ports instead, whose front-ends one testpmd loops: both directions are counted
//! together, and DPDK forwards between two `net_vhost` ports. `--idle adaptive` has vringd sleep
//! when there was nothing to do for a while; rows say so. `--write` puts each row that was measured
//! into a table and a chart of docs/performance.md, at once, and leaves the others; without a PATH
//! it measures all ten, and without `--size` at 64, 256 and 1518 bytes. Rows with `--size mix` and
//! those with `--frames` (64 bytes) are in tables of their own.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/generator.rs"]
mod generator;
#[path = "support/net.rs"]
mod net;
#[path = "support/table.rs"]
mod table;
#[path = "../tests/support/testpmd.rs"]
mod testpmd;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::{Duration, Instant};

use net::{BackEnd, Link, Load, Mpps, vhost};
use table::Table;
use testpmd::RingPath;
use turns::{Arguments, BenchDir, Run, Turns, in_turns, median};
use vringd::testing::probe::ProbeError;

/// What the command line asks for.
struct Options {
    link: Link,
    paths: Vec<RingPath>,
    pairs: usize,
    sizes: Vec<Size>,
    /// Put the results into the documentation, between the marks of this name.
    write: Option<&'static str>,
    idle: Idle,
    seconds: Duration,
    null: bool,
    against: Option<PathBuf>,
    /// Frames in flight, in one run after the other.
    frames: Vec<u32>,
}

/// Length of frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Bytes(u32),
    Mix,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = || text.parse().ok().filter(|size| (60..=1518).contains(size));
        match text {
            "mix" => Ok(Self::Mix),
            _ => bytes()
                .map(Self::Bytes)
                .ok_or(format!("--size is 60 to 1518 bytes, or mix, not {text:?}")),
        }
    }
}

/// What vringd's worker does without frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Idle {
    Spin,
    Adaptive,
}

impl Idle {
    fn parse(name: &str) -> Result<Self, String> {
        match name {
            "spin" => Ok(Self::Spin),
            "adaptive" => Ok(Self::Adaptive),
            _ => Err(format!("--idle is spin or adaptive, not {name:?}")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Spin => "spin",
            Self::Adaptive => "adaptive",
        }
    }

    /// What a row says of it behind its path.
    fn mark(self) -> &'static str {
        match self {
            Self::Spin => "",
            Self::Adaptive => ADAPTIVE,
        }
    }
}

const ADAPTIVE: &str = ", adaptive";

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => bytes.fmt(f),
            Self::Mix => f.write_str("mix"),
        }
    }
}

/// Frames that fill a ring.
const FULL: u32 = 1024;

/// The numbers of frames in flight in `--frames`.
fn frames(list: &str) -> Result<Vec<u32>, String> {
    let one = |text: &str| {
        let number = text.parse().ok();
        let known = |n: &u32| (1..=FULL).contains(n) && (*n <= 32 || n.is_multiple_of(32));
        number.filter(known).ok_or(format!(
            "--frames are up to 32, or multiples of it up to {FULL}, not {text:?}"
        ))
    };
    list.split(',').map(one).collect()
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let more = ["--against", "--frames", "--size", "--link", "--idle"];
        let mut arguments = Arguments::parse(args, &more)?;
        let null = arguments.take("--null");
        let value = |option| arguments.value(option);
        let path = |text: &String| {
            let path = text.parse().ok().and_then(RingPath::number);
            path.ok_or(format!("{text:?} is neither an option nor a path, 1 to 10"))
        };
        let mut options = Self {
            idle: value("--idle").map_or(Ok(Idle::Spin), Idle::parse)?,
            link: value("--link").map_or(Ok(Link::Echo), Link::parse)?,
            paths: arguments.parts.iter().map(path).collect::<Result<_, _>>()?,
            pairs: arguments.pairs,
            sizes: vec![value("--size").unwrap_or("64").parse()?],
            write: arguments.write.then_some("rings"),
            seconds: Duration::from_secs(arguments.seconds.into()),
            null,
            against: value("--against").map(PathBuf::from),
            frames: value("--frames").map_or(Ok(vec![FULL]), frames)?,
        };
        if options.write.is_some() {
            options.of_docs(arguments.value("--size").is_some())?;
        }
        if options.paths.is_empty() {
            options.paths = [1, 5].into_iter().filter_map(RingPath::number).collect();
        }
        if options.sizes == [Size::Mix] && options.link != Link::Echo {
            return Err("--size mix is for --link echo".to_owned());
        }
        Ok(options)
    }

    /// What `--write` says of what else was not said.
    fn of_docs(&mut self, sized: bool) -> Result<(), String> {
        if self.null || self.against.is_some() || self.link != Link::Echo {
            let reason = "--null, --against and --link are not for the documentation";
            return Err(format!("{reason}: leave out --write"));
        }
        let mut paths: Vec<u8> = (1..=10).collect();
        if self.sizes == [Size::Mix] {
            self.write = Some("rings-mix");
            // What the generator's rings are like decides, not DPDK's code for them.
            paths = vec![1, 3, 5, 8];
        } else if self.frames != [FULL] {
            self.write = Some("rings-frames");
        } else if !sized {
            self.sizes = [64, 256, 1518].map(Size::Bytes).into();
        }
        if self.paths.is_empty() {
            self.paths = paths.into_iter().filter_map(RingPath::number).collect();
        }
        Ok(())
    }

    /// What is measured, in the order of the table.
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for &size in &self.sizes {
            for &frames in &self.frames {
                let case = |&path| Case { path, size, frames };
                // The vectorised receive function of split rings takes no fewer than four.
                let works = |path: &&RingPath| path.number != 7 || frames >= 4;
                cases.extend(self.paths.iter().filter(works).map(case));
            }
        }
        cases
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

fn start(peer: Peer, options: &Options, sockets: &[PathBuf]) -> BackEnd {
    let this = PathBuf::from(env!("CARGO_BIN_EXE_vringd"));
    let other = options.against.as_ref();
    match peer {
        Peer::Dpdk => BackEnd::dpdk(&vhost(sockets), sockets),
        Peer::Vringd | Peer::Other => {
            let other = other.filter(|_| matches!(peer, Peer::Other));
            let command = Command::new(other.unwrap_or(&this));
            BackEnd::vringd(
                command,
                options.idle.name(),
                options.link.options(),
                sockets,
            )
        }
    }
}

/// What a row of the table is about.
#[derive(Clone, Copy)]
struct Case {
    path: RingPath,
    size: Size,
    /// In flight.
    frames: u32,
}

/// What a run found.
#[derive(Clone, Copy)]
struct Found {
    mpps: f64,
    /// The worker's turns, those that moved something and those that did not, in millions a second;
    /// not where our own front-end is the load.
    turns: [f64; 2],
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Mpps(self.mpps).fmt(f)
    }
}

#[expect(clippy::cast_precision_loss, reason = "turns are far below 2^53")]
fn run(peer: Peer, case: &Case, options: &Options, dir: &BenchDir) -> Found {
    let sockets = options.link.sockets(dir);
    let back_end = start(peer, options, &sockets);
    let Case { path, size, frames } = case;
    let time = options.seconds;
    match *size {
        Size::Bytes(size) => {
            let load = Load {
                path,
                size,
                frames: *frames,
                time,
                listens: false,
            };
            let look = |back_end: &mut BackEnd| (Instant::now(), back_end.turns());
            let (mpps, [before, after]) = net::looped_between(back_end, &sockets, load, look);
            let micros = (after.0 - before.0).as_secs_f64() * 1e6;
            let rate = |at: usize| match (before.1, after.1) {
                (Some(before), Some(after)) => (after[at] - before[at]) as f64 / micros,
                _ => f64::NAN,
            };
            Found {
                mpps: mpps.0,
                turns: [0, 1].map(rate),
            }
        }
        Size::Mix => {
            let load = generator::Load {
                path,
                size: "mix",
                ring_size: FULL,
                frames: *frames,
                time,
            };
            Found {
                mpps: generator::flooded(back_end, &sockets, load).0,
                turns: [f64::NAN; 2],
            }
        }
    }
}

/// Runs both in turns.
fn pairs(case: &Case, options: &Options, dir: &BenchDir) -> Result<Vec<Turns<Found>>, ProbeError> {
    let peers = [options.ours(), options.theirs()];
    let names = peers.map(|peer| options.name(peer));
    let Case { path, size, frames } = case;
    let what = format!("path {}, {size} bytes, {frames} in flight", path.number);
    in_turns(&what, options.pairs, &names, |peer| {
        Run::between_probes(|| run(peers[peer], case, options, dir))
    })
}

/// A line of the table.
fn line(case: &Case, idle: Idle, pairs: &Turns<Found>) -> String {
    let [ours, theirs] = [0, 1].map(|peer| median(pairs.values(peer, |found| found.mpps)));
    let turns = |at: usize| {
        let [ours, theirs] = [0, 1].map(|peer| median(pairs.values(peer, |found| found.turns[at])));
        format!("{} ({})", digits(ours), digits(theirs))
    };
    let (ratio, (least, most)) = pairs.ratio(1, |found| found.mpps);
    format!(
        "| {} {}{} | {} | {} | {} | {} | {} | {} | {ratio:.2} ({least:.2}–{most:.2}) | {} | \
         {}, {:.0} ns |",
        case.path.number,
        case.path.name,
        idle.mark(),
        case.size,
        case.frames,
        digits(ours),
        digits(theirs),
        turns(0),
        turns(1),
        pairs.runs.len(),
        pairs.distance_name(),
        pairs.probe_ns(),
    )
}

/// Three digits: a rate of one frame at a time is some hundredths of that of a thousand.
fn digits(mpps: f64) -> String {
    if mpps.is_nan() {
        return "–".to_owned();
    }
    let places = if mpps < 10.0 { 2 } else { 1 };
    format!("{mpps:.places$}")
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = BenchDir::new(&std::env::temp_dir())?;
    let head = head(options);
    let mut rows = Vec::new();
    let mut complete = true;
    for case in options.cases() {
        let by_distance = pairs(&case, options, &dir)?;
        complete &= by_distance.iter().any(|c| c.runs.len() >= options.pairs);
        let seen = by_distance.iter().filter(|c| !c.runs.is_empty());
        let lines: Vec<_> = seen.map(|class| line(&case, options.idle, class)).collect();
        if let Some(name) = options.write {
            write_docs(name, &head, &lines, options.pairs)?;
        }
        rows.extend(lines);
    }
    println!("{head}\n{}", rows.join("\n"));
    Ok(complete)
}

/// The table's first lines.
fn head(options: &Options) -> String {
    let [ours, theirs] = [options.ours(), options.theirs()].map(|peer| options.name(peer));
    format!(
        "| path | bytes | in flight | {ours}, Mpps | {theirs}, Mpps | \
         busy turns ({theirs}), M/s | empty turns ({theirs}), M/s | ratio (range) | pairs | \
         probe |\n\
         |---|---|---|---|---|---|---|---|---|---|"
    )
}

/// What a row is about, and where it stands: by size, then by path.
fn rank(cells: &[&str]) -> Option<(u32, u8, bool, u32)> {
    let &[path, size, frames, ..] = cells else {
        return None;
    };
    let bytes = match size.parse().ok()? {
        Size::Bytes(bytes) => bytes,
        Size::Mix => 0,
    };
    let number = path.split(' ').next()?.parse().ok()?;
    let is_adaptive = path.ends_with(ADAPTIVE);
    Some((bytes, number, is_adaptive, frames.parse().ok()?))
}

fn write_docs(name: &str, head: &str, new: &[String], pairs: usize) -> Result<(), String> {
    let table = Table {
        name,
        head,
        title: "Frames per second, vringd / net_vhost",
        pairs,
    };
    table.write(new, rank, |cells| {
        let (path, size, frames) = (cells[0], cells[1], cells[2]);
        let panel = match frames.parse() {
            Ok(FULL) => format!("{size} bytes"),
            _ => format!("{frames} in flight"),
        };
        (panel, path.to_owned())
    })
}

fn main() -> ExitCode {
    turns::run_bench(
        "rings",
        "pairs",
        Options::parse,
        |_| std::env::temp_dir(),
        bench,
    )
}
