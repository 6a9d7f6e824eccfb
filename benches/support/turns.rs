//! Measurements in turns, each between two measurements of the round trip between the cores and of
//! what they get done.

use std::fmt::{self, Display};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use vringd::testing::probe::{self, Distance, ProbeError};

mod supervise;

pub(crate) const FRONT_END_CORE: usize = 0;
pub(crate) const BACK_END_CORE: usize = 1;

/// Attempts for each turn that is wanted, before it is given up.
const ATTEMPTS_PER_TURN: usize = 4;

/// The conditions before or after a run.
#[derive(Clone, Copy)]
pub(crate) struct Probe {
    round_trip_ns: f64,
    /// Of the front-end's core and the back-end's, both busy.
    speeds: [f64; 2],
}

impl Probe {
    fn measure() -> Result<Self, ProbeError> {
        Ok(Self {
            speeds: probe::speeds([FRONT_END_CORE, BACK_END_CORE])?,
            round_trip_ns: probe::round_trip_ns(FRONT_END_CORE, BACK_END_CORE, probe::ROUND_TRIPS)?,
        })
    }
}

/// One run: what it brought, and the conditions before and after it.
#[derive(Clone, Copy)]
pub(crate) struct Run<T> {
    pub(crate) value: T,
    pub(crate) probes: [Probe; 2],
}

impl<T> Run<T> {
    /// Runs between two probes: nothing of the run may be alive when `run` returns.
    pub(crate) fn between_probes(run: impl FnOnce() -> T) -> Result<Self, ProbeError> {
        let before = Probe::measure()?;
        let value = run();
        Ok(Self {
            value,
            probes: [before, Probe::measure()?],
        })
    }
}

/// The distance at which all `runs` were made; none when that or what the cores got done changed,
/// or something else ran.
fn distance<T>(runs: &[Run<T>]) -> Option<Distance> {
    let probes = || runs.iter().flat_map(|run| run.probes);
    let mut distances = probes().map(|probe| Distance::of(probe.round_trip_ns));
    let first = distances.next()?;
    let is_steady = |core: usize| probe::is_steady(probes().map(|probe| probe.speeds[core]));
    (first != Distance::Disturbed
        && distances.all(|other| other == first)
        && is_steady(0)
        && is_steady(1))
    .then_some(first)
}

impl<T: Display> Display for Run<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, after] = self.probes.map(|probe| {
            let [front, back] = probe.speeds;
            format!("{:.0} ns {front:.0}/{back:.0}", probe.round_trip_ns)
        });
        write!(f, "{} ({before}, {after})", self.value)
    }
}

/// The turns that were made under one class of conditions.
pub(crate) struct Turns<T> {
    /// None when it changed and the load was one to which that does not matter.
    distance: Option<Distance>,
    /// In each, a run of every peer.
    pub(crate) runs: Vec<Vec<Run<T>>>,
}

impl<T> Turns<T> {
    /// What a peer brought, in each turn.
    pub(crate) fn values(&self, peer: usize, of: impl Fn(&T) -> f64) -> Vec<f64> {
        self.runs.iter().map(|turn| of(&turn[peer].value)).collect()
    }

    /// The word for the conditions.
    pub(crate) fn distance_name(&self) -> &'static str {
        self.distance.map_or("changed", Distance::name)
    }

    /// The middle of all round trips.
    pub(crate) fn probe_ns(&self) -> f64 {
        let all = self.runs.iter().flatten().flat_map(|run| run.probes);
        median(all.map(|probe| probe.round_trip_ns))
    }

    /// The middle, the least and the greatest of the first peer's values over those of `peer`.
    pub(crate) fn ratio(&self, peer: usize, of: impl Fn(&T) -> f64) -> (f64, (f64, f64)) {
        let ratio = |turn: &Vec<Run<T>>| of(&turn[0].value) / of(&turn[peer].value);
        let ratios: Vec<f64> = self.runs.iter().map(ratio).collect();
        let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let greatest = ratios.iter().copied().fold(0.0, f64::max);
        (median(ratios), (least, greatest))
    }
}

/// Runs all `peers` in turns until one class of conditions has seen as many turns as `wanted`.
pub(crate) fn in_turns<T: Display>(
    what: &str,
    wanted: usize,
    peers: &[String],
    mut run: impl FnMut(usize) -> Result<Run<T>, ProbeError>,
) -> Result<Vec<Turns<T>>, ProbeError> {
    let mut classes = [Distance::Near, Distance::Far].map(|distance| Turns {
        distance: Some(distance),
        runs: Vec::new(),
    });
    for _ in 0..wanted * ATTEMPTS_PER_TURN {
        let turn = peers_in_turn(peers, &mut run)?;
        let distance = distance(&turn);
        let verdict = match distance {
            Some(_) => "",
            None => ": discarded",
        };
        eprintln!("{what}: {}{verdict}", said(peers, &turn));
        if let Some(class) = classes.iter_mut().find(|c| c.distance == distance) {
            class.runs.push(turn);
        }
        if classes.iter().any(|class| class.runs.len() >= wanted) {
            break;
        }
    }
    Ok(classes.into())
}

/// Runs all `peers` in turns, as often as `wanted`, whatever the distance between the cores does:
/// for loads that a device holds back.
#[allow(dead_code, reason = "others have no such load")]
pub(crate) fn in_all_turns<T: Display>(
    what: &str,
    wanted: usize,
    peers: &[String],
    mut run: impl FnMut(usize) -> Result<Run<T>, ProbeError>,
) -> Result<Vec<Turns<T>>, ProbeError> {
    let mut runs = Vec::new();
    for _ in 0..wanted {
        let turn = peers_in_turn(peers, &mut run)?;
        eprintln!("{what}: {}", said(peers, &turn));
        runs.push(turn);
    }
    let first = runs.first().and_then(|turn| distance(turn));
    let distance = first.filter(|_| runs.iter().all(|turn| distance(turn) == first));
    Ok(vec![Turns { distance, runs }])
}

/// Says whose run it was that panicked.
struct Running<'a>(&'a str);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "that was a run of {}", self.0);
        }
    }
}

fn peers_in_turn<T>(
    peers: &[String],
    mut run: impl FnMut(usize) -> Result<Run<T>, ProbeError>,
) -> Result<Vec<Run<T>>, ProbeError> {
    let peers = peers.iter().enumerate();
    peers
        .map(|(number, peer)| {
            let _running = Running(peer);
            run(number)
        })
        .collect()
}

fn said<T: Display>(peers: &[String], turn: &[Run<T>]) -> String {
    let said = peers.iter().zip(turn);
    let said: Vec<_> = said.map(|(peer, run)| format!("{peer} {run}")).collect();
    said.join(", ")
}

/// The middle of some values, or the mean of the two in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let upper = values[values.len() / 2];
    let lower = values[(values.len() - 1) / 2];
    f64::midpoint(lower, upper)
}

/// A directory for sockets and files, removed at the end.
pub(crate) struct BenchDir(PathBuf);

impl BenchDir {
    pub(crate) fn new(parent: &Path) -> std::io::Result<Self> {
        let dir = parent.join(format!("vringd-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// Where a file of this name is or could be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A path where no socket is.
    pub(crate) fn fresh_socket(&self) -> PathBuf {
        let socket = self.path("back-end.sock");
        let _ = std::fs::remove_file(&socket);
        socket
    }
}

impl Drop for BenchDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the command line of a bench says: options, and what else there is, usually parts of the
/// names of rows.
pub(crate) struct Arguments {
    pub(crate) pairs: usize,
    pub(crate) seconds: u32,
    pub(crate) write: bool,
    /// Further options, and what was given with each.
    values: Vec<(String, String)>,
    pub(crate) parts: Vec<String>,
}

#[allow(dead_code, reason = "each bench uses its part")]
impl Arguments {
    /// Reads them; the options in `more` take a value each.
    pub(crate) fn parse(
        mut args: impl Iterator<Item = String>,
        more: &[&str],
    ) -> Result<Self, String> {
        let mut arguments = Self {
            pairs: 5,
            seconds: 1,
            write: false,
            values: Vec::new(),
            parts: Vec::new(),
        };
        while let Some(arg) = args.next() {
            let mut value = || {
                let value = args.next().filter(|value| !value.starts_with("--"));
                value.ok_or(format!("{arg} takes a value"))
            };
            match arg.as_str() {
                "--pairs" => arguments.pairs = number(&arg, &value()?)? as usize,
                "--seconds" => arguments.seconds = number(&arg, &value()?)?,
                "--write" => arguments.write = true,
                // Added by cargo.
                "--bench" => {}
                name if more.contains(&name) => {
                    let value = value()?;
                    arguments.values.push((arg, value));
                }
                _ => arguments.parts.push(arg),
            }
        }
        Ok(arguments)
    }

    /// What was given with a further option; the last, if there are several.
    pub(crate) fn value(&self, option: &str) -> Option<&str> {
        let mut given = self.values.iter().rev();
        given.find_map(|(name, value)| (name == option).then_some(value.as_str()))
    }

    /// The same as a number.
    pub(crate) fn number(&self, option: &str) -> Result<Option<u32>, String> {
        let value = self.value(option);
        value.map(|value| number(option, value)).transpose()
    }

    /// Whether an option without a value is there.
    pub(crate) fn take(&mut self, option: &str) -> bool {
        let before = self.parts.len();
        self.parts.retain(|part| part != option);
        self.parts.len() < before
    }

    /// Those rows of all in whose names one of the parts is; all, where none is given.
    pub(crate) fn rows<C>(&self, all: Vec<C>, name: fn(&C) -> String) -> Result<Vec<C>, String> {
        let has = |row: &C, part: &String| name(row).contains(part.as_str());
        let unknown = |part: &&String| !all.iter().any(|row| has(row, part));
        if let Some(part) = self.parts.iter().find(unknown) {
            return Err(format!("{part:?} is neither an option nor in a row's name"));
        }
        let wanted =
            |row: &C| self.parts.is_empty() || self.parts.iter().any(|part| has(row, part));
        Ok(all.into_iter().filter(wanted).collect())
    }
}

fn number(option: &str, value: &str) -> Result<u32, String> {
    let number = value.parse().ok().filter(|&number| number > 0);
    number.ok_or(format!("{option} takes a number above 0, not {value:?}"))
}

/// What stands between the marks of this `name` in docs/performance.md.
#[allow(dead_code, reason = "others write all rows at once")]
pub(crate) fn table_in_docs(name: &str) -> Result<String, String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    let text = std::fs::read_to_string(&page);
    let text = text.map_err(|error| format!("{}: {error}", page.display()))?;
    let begin = text.split_once(&format!("<!-- {name}: begin -->\n"));
    let table = begin.and_then(|(_, rest)| rest.split_once(&format!("<!-- {name}: end -->")));
    let (table, _) = table.ok_or(format!("{} has no marks for the table", page.display()))?;
    Ok(table.to_owned())
}

/// Puts a table between the marks of this `name` in docs/performance.md, and an image beside it.
#[allow(dead_code, reason = "others have tables without a chart")]
pub(crate) fn write_docs(name: &str, table: &str, svg: &str) -> Result<(), String> {
    write_table(name, table)?;
    write_chart(name, svg)
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

fn failed(path: &Path, error: std::io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// Puts a table between the marks of this `name` in docs/performance.md.
pub(crate) fn write_table(name: &str, table: &str) -> Result<(), String> {
    let page = docs().join("performance.md");
    let text = std::fs::read_to_string(&page).map_err(|error| failed(&page, error))?;
    let marks = [
        format!("<!-- {name}: begin -->\n"),
        format!("<!-- {name}: end -->"),
    ];
    let [begin, end] = marks.each_ref().map(|mark| text.find(mark));
    let (Some(begin), Some(end)) = (begin, end) else {
        return Err(format!("{} has no marks for the table", page.display()));
    };
    let (before, after) = (&text[..begin + marks[0].len()], &text[end..]);
    std::fs::write(&page, format!("{before}{table}{after}")).map_err(|error| failed(&page, error))
}

/// Puts an image of this `name` beside docs/performance.md.
pub(crate) fn write_chart(name: &str, svg: &str) -> Result<(), String> {
    let image = docs().join(format!("performance-{name}.svg"));
    std::fs::write(&image, svg).map_err(|error| failed(&image, error))
}

/// The `main` of bench `name`: reads its options, and says when some `turns` are missing. Nothing
/// is left behind, however it ends; `dir`: where it has directories beside those for such.
pub(crate) fn run_bench<O>(
    name: &str,
    turns: &str,
    parse: impl FnOnce(std::iter::Skip<std::env::Args>) -> Result<O, String>,
    dir: impl FnOnce(&O) -> PathBuf,
    bench: impl FnOnce(&O) -> Result<bool, Box<dyn std::error::Error>>,
) -> ExitCode {
    // Without this cargo is testing, not benchmarking: that it builds is all there is to test.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{name}: {message}");
            return ExitCode::from(2);
        }
    };
    if let Some(ended) = supervise::above(&dir(&options)) {
        return ended;
    }
    match bench(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{name}: too many runs were disturbed: some {turns} are missing");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
