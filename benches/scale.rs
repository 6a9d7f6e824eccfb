//! What a frame costs with many devices on a worker, and on long rings, in turns.
//!
//! `vringd bench net` on core 0 floods one device with rings of 256, and then many, or one with
//! longer rings, which vringd echoes on core 1. A ratio of 1 says that a frame costs the same; each
//! run stands between two measurements of the cache-line round trip between the cores, as in
//! `rings`.
//!
//! `scripts/bench scale [ROW…] [--pairs N] [--seconds S] [--against BINARY] [--write]`, where a ROW
//! is part of a row's name: `devices`, `"64 devices"`, `packed`. `--against` compares each row with
//! what another build of vringd does under the same load. `--write` puts each row that was measured
//! into the table and the chart of docs/performance.md, at once; the others stay.

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

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use generator::Load;
use net::{BackEnd, Mpps};
use table::Table;
use testpmd::RingPath;
use turns::{Arguments, BenchDir, Run, Turns, in_turns, median};
use vringd::testing::probe::ProbeError;

/// In flight over all devices at least, and on each of many.
const FRAMES: u32 = 256;
const FRAMES_EACH: u32 = 32;

/// What is measured.
#[derive(Clone, Copy)]
struct Case {
    path: RingPath,
    devices: u32,
    ring_size: u32,
}

impl Case {
    /// What all others with rings of this format are compared with.
    fn base(self) -> Case {
        Case {
            devices: 1,
            ring_size: 256,
            ..self
        }
    }

    /// All rows, in the order of the table.
    fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for path in [1, 5].into_iter().filter_map(RingPath::number) {
            let case = |devices, ring_size| Case {
                path,
                devices,
                ring_size,
            };
            cases.extend([2, 8, 64].map(|devices| case(devices, 256)));
            cases.extend([1024, 4096, 32768].map(|size| case(1, size)));
        }
        cases
    }

    fn name(&self) -> String {
        let format = if self.path.packed { "packed" } else { "split" };
        let devices = if self.devices == 1 {
            "device"
        } else {
            "devices"
        };
        format!(
            "{} {devices}, {format} rings of {}",
            self.devices, self.ring_size
        )
    }

    fn run(&self, build: Option<&Path>, seconds: u32, dir: &BenchDir) -> Mpps {
        let socket = |number| {
            let socket = dir.path(&format!("{number}.sock"));
            let _ = std::fs::remove_file(&socket);
            socket
        };
        let sockets: Vec<PathBuf> = (0..self.devices).map(socket).collect();
        let this = Path::new(env!("CARGO_BIN_EXE_vringd"));
        let command = Command::new(build.unwrap_or(this));
        let options = vec!["link=echo"; sockets.len()];
        let back_end = BackEnd::vringd(command, "spin", &options, &sockets);
        let load = Load {
            path: &self.path,
            size: "64",
            ring_size: self.ring_size,
            frames: (FRAMES / self.devices).max(FRAMES_EACH),
            time: Duration::from_secs(seconds.into()),
        };
        generator::flooded(back_end, &sockets, load)
    }
}

/// What the command line asks for.
struct Options {
    rows: Vec<Case>,
    pairs: usize,
    seconds: u32,
    against: Option<PathBuf>,
    write: bool,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let arguments = Arguments::parse(args, &["--against"])?;
        let against = arguments.value("--against");
        if arguments.write && against.is_some() {
            return Err("--against is not for the documentation: leave out --write".to_owned());
        }
        Ok(Self {
            rows: arguments.rows(Case::all(), Case::name)?,
            pairs: arguments.pairs,
            seconds: arguments.seconds,
            against: against.map(PathBuf::from),
            write: arguments.write,
        })
    }
}

fn measure(case: &Case, options: &Options, dir: &BenchDir) -> Result<Vec<Turns<Mpps>>, ProbeError> {
    let against = options.against.as_deref();
    let other = against.map_or(case.base(), |_| *case);
    let cases = [(*case, None), (other, against)];
    let names = cases.map(|(case, build)| match build {
        None => case.name(),
        Some(build) => build.display().to_string(),
    });
    let name = case.name();
    let turns = in_turns(&name, options.pairs, &names, |which| {
        let (case, build) = cases[which];
        Run::between_probes(|| case.run(build, options.seconds, dir))
    })?;
    Ok(turns.into_iter().filter(|t| !t.runs.is_empty()).collect())
}

/// The line of the table.
fn line(case: &Case, turns: &Turns<Mpps>) -> String {
    let [this, base] = [0, 1].map(|which| median(turns.values(which, |mpps| mpps.0)));
    let (ratio, (least, most)) = turns.ratio(1, |mpps| mpps.0);
    format!(
        "| {} | {this:.1} | {base:.1} | {ratio:.2} ({least:.2}–{most:.2}) | {} | {}, {:.0} ns |",
        case.name(),
        turns.runs.len(),
        turns.distance_name(),
        turns.probe_ns(),
    )
}

/// The table's first lines, beside `other`.
fn head(other: &str) -> String {
    format!(
        "| load | Mpps | {other}, Mpps | ratio (range) | pairs | probe |\n\
         |---|---|---|---|---|---|"
    )
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = BenchDir::new(&std::env::temp_dir())?;
    let head = head(&match &options.against {
        None => "one device, rings of 256".to_owned(),
        Some(build) => build.display().to_string(),
    });
    let mut rows = Vec::new();
    let mut complete = true;
    for case in &options.rows {
        let seen = measure(case, options, &dir)?;
        complete &= seen.iter().any(|turns| turns.runs.len() >= options.pairs);
        let lines: Vec<_> = seen.iter().map(|turns| line(case, turns)).collect();
        if options.write {
            write_docs(&head, &lines, options.pairs)?;
        }
        rows.extend(lines);
    }
    println!("{head}\n{}", rows.join("\n"));
    Ok(complete)
}

fn write_docs(head: &str, new: &[String], pairs: usize) -> Result<(), String> {
    let all = Case::all();
    let at = |cells: &[&str]| all.iter().position(|case| case.name() == cells[0]);
    let table = Table {
        name: "scale",
        head,
        title: "Frames per second, beside one device with rings of 256",
        pairs,
    };
    table.write(new, at, |cells| {
        let is_packed = at(cells).is_some_and(|at| all[at].path.packed);
        let format = if is_packed { "packed" } else { "split" };
        (format!("{format} rings"), cells[0].to_owned())
    })
}

fn main() -> ExitCode {
    turns::run_bench(
        "scale",
        "pairs",
        Options::parse,
        |_| std::env::temp_dir(),
        bench,
    )
}
