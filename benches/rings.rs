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
//! together, and DPDK forwards between two `net_vhost` ports. `--write` measures all ten paths at
//! 64, 256 and 1518 bytes and puts table and chart into docs/performance.md; with `--size mix`
//! those, with `--frames` 64 bytes alone, in a table of their own.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/generator.rs"]
mod generator;
#[path = "support/net.rs"]
mod net;
#[path = "../tests/support/testpmd.rs"]
mod testpmd;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::Duration;

use net::{BackEnd, Link, Load, Mpps, vhost};
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
        let more = ["--against", "--frames", "--size", "--link"];
        let mut arguments = Arguments::parse(args, &more)?;
        let null = arguments.take("--null");
        let value = |option| arguments.value(option);
        let path = |text: &String| {
            let path = text.parse().ok().and_then(RingPath::number);
            path.ok_or(format!("{text:?} is neither an option nor a path, 1 to 10"))
        };
        let mut options = Self {
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
            options.paths = (1..=10).filter_map(RingPath::number).collect();
            if options.sizes == [Size::Mix] {
                options.write = Some("rings-mix");
                // What the generator's rings are like decides, not DPDK's code for them.
                options.paths = [1, 3, 5, 8]
                    .into_iter()
                    .filter_map(RingPath::number)
                    .collect();
            } else if options.frames == [FULL] {
                options.sizes = [64, 256, 1518].map(Size::Bytes).into();
            } else {
                options.write = Some("rings-frames");
                options.sizes = vec![Size::Bytes(64)];
            }
        }
        if options.paths.is_empty() {
            options.paths = [1, 5].into_iter().filter_map(RingPath::number).collect();
        }
        if options.sizes == [Size::Mix] && options.link != Link::Echo {
            return Err("--size mix is for --link echo".to_owned());
        }
        Ok(options)
    }

    /// What is measured, in the order of the table.
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for &size in &self.sizes {
            for &frames in &self.frames {
                let case = |&path| Case { path, size, frames };
                cases.extend(self.paths.iter().map(case));
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
            BackEnd::vringd(command, "spin", options.link.options(), sockets)
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

fn run(peer: Peer, case: &Case, options: &Options, dir: &BenchDir) -> Mpps {
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
            net::looped(back_end, &sockets, load)
        }
        Size::Mix => {
            let load = generator::Load {
                path,
                size: "mix",
                ring_size: FULL,
                frames: *frames,
                time,
            };
            generator::flooded(back_end, &sockets, load)
        }
    }
}

/// Runs both in turns.
fn pairs(case: &Case, options: &Options, dir: &BenchDir) -> Result<Vec<Turns<Mpps>>, ProbeError> {
    let peers = [options.ours(), options.theirs()];
    let names = peers.map(|peer| options.name(peer));
    let Case { path, size, frames } = case;
    let what = format!("path {}, {size} bytes, {frames} in flight", path.number);
    in_turns(&what, options.pairs, &names, |peer| {
        Run::between_probes(|| run(peers[peer], case, options, dir))
    })
}

/// A line of the table.
struct Row {
    case: Case,
    distance: &'static str,
    probe_ns: f64,
    /// Medians of both, in Mpps.
    mpps: [f64; 2],
    ratio: f64,
    range: (f64, f64),
    pairs: usize,
}

impl Row {
    fn new(case: Case, pairs: &Turns<Mpps>) -> Self {
        let (ratio, range) = pairs.ratio(1, |mpps| mpps.0);
        Self {
            case,
            distance: pairs.distance_name(),
            probe_ns: pairs.probe_ns(),
            mpps: [0, 1].map(|peer| median(pairs.values(peer, |mpps| mpps.0))),
            ratio,
            range,
            pairs: pairs.runs.len(),
        }
    }

    fn path(&self) -> String {
        let path = &self.case.path;
        format!("{} {}", path.number, path.name)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {} | {} | {} | {} | {} | {:.2} ({:.2}–{:.2}) | {} | {}, {:.0} ns |",
            self.path(),
            self.case.size,
            self.case.frames,
            digits(self.mpps[0]),
            digits(self.mpps[1]),
            self.ratio,
            self.range.0,
            self.range.1,
            self.pairs,
            self.distance,
            self.probe_ns,
        )
    }
}

/// Three digits: a rate of one frame at a time is some hundredths of that of a thousand.
fn digits(mpps: f64) -> String {
    let places = if mpps < 10.0 { 2 } else { 1 };
    format!("{mpps:.places$}")
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = BenchDir::new(&std::env::temp_dir())?;
    let mut rows = Vec::new();
    let mut complete = true;
    for case in options.cases() {
        let by_distance = pairs(&case, options, &dir)?;
        complete &= by_distance.iter().any(|c| c.runs.len() >= options.pairs);
        let seen = by_distance.iter().filter(|c| !c.runs.is_empty());
        rows.extend(seen.map(|class| Row::new(case, class)));
    }
    let table = table(options, &rows);
    print!("{table}");
    if let Some(name) = options.write {
        write_docs(name, &table, &rows, options.pairs)?;
    }
    Ok(complete)
}

fn table(options: &Options, rows: &[Row]) -> String {
    let [ours, theirs] = [options.ours(), options.theirs()].map(|peer| options.name(peer));
    let mut table = format!(
        "| path | bytes | in flight | {ours}, Mpps | {theirs}, Mpps | ratio (range) | pairs | \
         probe |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for row in rows {
        table.push_str(&format!("{row}\n"));
    }
    table
}

/// Puts table and chart into docs/performance.md. The chart has the rows with all pairs: the others
/// say what was seen in passing.
fn write_docs(name: &str, table: &str, rows: &[Row], pairs: usize) -> Result<(), String> {
    let bars: Vec<_> = rows
        .iter()
        .filter(|row| row.pairs >= pairs)
        .map(|row| chart::Bar {
            panel: match row.case.frames {
                FULL => format!("{} bytes", row.case.size),
                frames => format!("{frames} in flight"),
            },
            label: format!("{} ({})", row.path(), row.distance),
            ratio: row.ratio,
            range: row.range,
        })
        .collect();
    let title = "Frames per second, vringd / net_vhost";
    turns::write_docs(name, table, &chart::svg(title, &bars))
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
