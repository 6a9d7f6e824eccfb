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
#[path = "support/net.rs"]
mod net;
#[path = "../tests/support/testpmd.rs"]
mod testpmd;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use net::{BackEnd, Link, Load, Mpps, vhost};
use testpmd::RingPath;
use turns::{BenchDir, Run, Turns, in_turns, median};
use vringd::testing::probe::ProbeError;

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

fn run(peer: Peer, path: &RingPath, size: u32, options: &Options, dir: &BenchDir) -> Mpps {
    let sockets = options.link.sockets(dir);
    let back_end = start(peer, options, &sockets);
    let load = Load {
        path,
        size,
        bursts: options.bursts,
        time: options.seconds,
    };
    net::looped(back_end, &sockets, load)
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
    turns::run_bench("rings", "pairs", Options::parse, bench)
}
