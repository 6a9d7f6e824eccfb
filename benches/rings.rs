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
//! `--write` measures all ten paths at 64, 256 and 1518 bytes and puts table and chart into
//! docs/performance.md.

#[path = "support/chart.rs"]
mod chart;
#[path = "../tests/support/testpmd.rs"]
mod testpmd;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use testpmd::{RingPath, Testpmd, TestpmdConfig};
use vringd::testing::probe::{self, Distance};

const FRONT_END_CORE: usize = 0;
const BACK_END_CORE: usize = 1;

/// Traffic before the measurement, in which caches and batches settle.
const WARM_UP: Duration = Duration::from_millis(500);

/// How long a back-end may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Attempts for each pair that is wanted, before a path is given up.
const ATTEMPTS_PER_PAIR: usize = 4;

/// What the command line asks for.
struct Options {
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
    fn start(peer: Peer, options: &Options, socket: &Path) -> Self {
        let this = PathBuf::from(env!("CARGO_BIN_EXE_vringd"));
        let back_end = match peer {
            Peer::Vringd | Peer::Other => {
                let other = options.against.as_ref();
                let binary = other
                    .filter(|_| matches!(peer, Peer::Other))
                    .unwrap_or(&this);
                let net = format!("name=net0,socket={},link=echo", socket.display());
                let core = BACK_END_CORE.to_string();
                let child = Command::new(binary)
                    .args(["run", "--log-level", "warn", "--core", &core])
                    .args(["--idle", "spin", "--net", &net])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .spawn()
                    .expect("vringd was built with this bench");
                Self::Vringd(child)
            }
            Peer::Dpdk => Self::Dpdk {
                testpmd: Testpmd::start(&TestpmdConfig::vhost_echo(BACK_END_CORE, socket, 1)),
            },
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while !socket.exists() {
            assert!(
                Instant::now() < deadline,
                "no socket at {}",
                socket.display()
            );
            thread::yield_now();
        }
        back_end
    }
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

/// A directory for sockets, removed at the end.
struct SocketDir(PathBuf);

impl SocketDir {
    fn new() -> std::io::Result<Self> {
        let dir = std::env::temp_dir().join(format!("vringd-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// A path where no socket is.
    fn fresh_socket(&self) -> PathBuf {
        let socket = self.0.join("net0.sock");
        let _ = std::fs::remove_file(&socket);
        socket
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One run: what it moved, and the round trips before and after it.
#[derive(Clone, Copy)]
struct Run {
    mpps: f64,
    probes_ns: [f64; 2],
}

impl Run {
    /// The conditions of the run; none when they changed or something else ran.
    fn distance(&self) -> Option<Distance> {
        let [before, after] = self.probes_ns.map(Distance::of);
        (before == after && before != Distance::Disturbed).then_some(before)
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, after] = self.probes_ns;
        write!(f, "{:.2} Mpps ({before:.0}, {after:.0} ns)", self.mpps)
    }
}

/// Both cores must be free for this: nothing of a run may be alive.
fn probe_ns() -> Result<f64, probe::ProbeError> {
    probe::round_trip_ns(FRONT_END_CORE, BACK_END_CORE, probe::ROUND_TRIPS)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "frames per second are far below 2^53"
)]
fn run(
    peer: Peer,
    path: &RingPath,
    size: u32,
    options: &Options,
    dir: &SocketDir,
) -> Result<Run, probe::ProbeError> {
    let before = probe_ns()?;
    let socket = dir.fresh_socket();
    let back_end = BackEnd::start(peer, options, &socket);
    let mut front_end = Testpmd::start(&path.front_end(&socket));
    front_end.start_traffic(&size.to_string(), options.bursts);
    thread::sleep(WARM_UP);
    // The rate in an answer is that since the question before.
    let warm = front_end.stats(0);
    thread::sleep(options.seconds);
    let stats = front_end.stats(0);
    assert!(
        stats.rx_packets > warm.rx_packets,
        "traffic stopped: {stats:?}"
    );
    front_end.quit();
    drop(back_end);
    Ok(Run {
        mpps: stats.rx_pps as f64 / 1e6,
        probes_ns: [before, probe_ns()?],
    })
}

/// The pairs of a path that count.
struct Pairs {
    distance: Distance,
    runs: Vec<(Run, Run)>,
}

/// Runs both in turns until one class of conditions has seen as many pairs as wanted.
fn pairs(
    path: &RingPath,
    size: u32,
    options: &Options,
    dir: &SocketDir,
) -> Result<Vec<Pairs>, probe::ProbeError> {
    let mut by_distance = [Distance::Near, Distance::Far].map(|distance| Pairs {
        distance,
        runs: Vec::new(),
    });
    for _ in 0..options.pairs * ATTEMPTS_PER_PAIR {
        let ours = run(options.ours(), path, size, options, dir)?;
        let theirs = run(options.theirs(), path, size, options, dir)?;
        let counts = ours.distance().is_some() && ours.distance() == theirs.distance();
        let verdict = if counts { "" } else { ": discarded" };
        let name = options.name(options.theirs());
        eprintln!(
            "path {}, {size} bytes: {ours}, {name} {theirs}{verdict}",
            path.number
        );
        if let Some(distance) = ours.distance().filter(|_| counts) {
            let class = by_distance.iter_mut().find(|c| c.distance == distance);
            class
                .expect("a distance that counts")
                .runs
                .push((ours, theirs));
        }
        if by_distance.iter().any(|c| c.runs.len() >= options.pairs) {
            break;
        }
    }
    Ok(by_distance.into())
}

/// The middle of some values, or the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = values[values.len() / 2];
    let lower = values[(values.len() - 1) / 2];
    f64::midpoint(lower, upper)
}

/// A line of the table.
struct Row {
    path: String,
    size: u32,
    distance: Distance,
    probe_ns: f64,
    /// Medians of both, in Mpps.
    mpps: [f64; 2],
    ratio: f64,
    range: (f64, f64),
    pairs: usize,
}

impl Row {
    fn new(path: &RingPath, size: u32, pairs: &Pairs) -> Self {
        let ratios = || pairs.runs.iter().map(|(ours, dpdk)| ours.mpps / dpdk.mpps);
        let both = |(ours, dpdk): &(Run, Run)| [ours.probes_ns, dpdk.probes_ns].concat();
        Self {
            path: format!("{} {}", path.number, path.name),
            size,
            distance: pairs.distance,
            probe_ns: median(pairs.runs.iter().flat_map(both)),
            mpps: [
                median(pairs.runs.iter().map(|(ours, _)| ours.mpps)),
                median(pairs.runs.iter().map(|(_, dpdk)| dpdk.mpps)),
            ],
            ratio: median(ratios()),
            range: (
                ratios().fold(f64::INFINITY, f64::min),
                ratios().fold(0.0, f64::max),
            ),
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
            self.distance.name(),
            self.probe_ns,
        )
    }
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = SocketDir::new()?;
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

/// Puts the table between its marks in docs/performance.md, and the chart beside it. The chart has
/// the rows with all pairs: the others say what was seen in passing.
fn write_docs(table: &str, rows: &[Row], pairs: usize) -> Result<(), Box<dyn std::error::Error>> {
    const MARKS: [&str; 2] = ["<!-- rings: begin -->\n", "<!-- rings: end -->"];
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let page = docs.join("performance.md");
    let text = std::fs::read_to_string(&page)?;
    let [begin, end] = MARKS.map(|mark| text.find(mark));
    let (Some(begin), Some(end)) = (begin, end) else {
        return Err(format!("{} has no marks for the table", page.display()).into());
    };
    let (before, after) = (&text[..begin + MARKS[0].len()], &text[end..]);
    std::fs::write(&page, format!("{before}{table}{after}"))?;
    let bars: Vec<_> = rows
        .iter()
        .filter(|row| row.pairs >= pairs)
        .map(|row| chart::Bar {
            panel: format!("{} bytes", row.size),
            label: format!("{} ({})", row.path, row.distance.name()),
            ratio: row.ratio,
            range: row.range,
        })
        .collect();
    let title = "Frames per second, vringd / net_vhost";
    std::fs::write(docs.join("performance-rings.svg"), chart::svg(title, &bars))?;
    Ok(())
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
