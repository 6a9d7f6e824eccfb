//! How many requests per second a disk serves, beside qemu-storage-daemon's and fio's, in turns.
//!
//! One front-end (`vringd bench blk` on core 0, one queue) is given vringd and qemu-storage-daemon
//! with a polling iothread on core 1 alternately; for disks behind O_DIRECT, fio's io_uring engine
//! takes its turn on core 1, straight from the host. Each run stands between two measurements of
//! the cache-line round trip between the cores, as in `rings`; where a disk is what takes the time,
//! no turn is thrown away when that changes. What carries over to other machines is the ratio.
//!
//! Rows with a number of queues are vringd's alone: with two workers on two cores one of them
//! shares its core with the front-end, so that not the rate but the CPU time per request (the last
//! number of a cell) tells what a second worker costs.
//!
//! Rows that say adaptive have vringd sleep when there was nothing to do for a while, to compare
//! the CPU time per request.
//!
//! Rows with an option of io_uring have vringd without it beside vringd with it, rows with
//! `packed` split rings beside packed ones, both of whose drivers write each request's descriptors
//! anew as guests' do (`--rewrite`), and rows with `memcpy` a loop on core 1 that copies
//! blocks at random, without a ring or a guest, while another thread polls on core 0; in a table of
//! their own.
//!
//! `scripts/bench blk [ROW…] [--pairs N] [--seconds S] [--dir PATH] [--write]`, where a ROW is part
//! of a row's name: `null`, `ram`, `tmpfs`, `disk`, `sqpoll`, or `"null randread 32"`. `--dir` is
//! where the disk's file is made, on a file system with O_DIRECT. `--write` puts what was measured
//! into the tables and charts of docs/performance.md.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/memcpy.rs"]
mod memcpy;
#[path = "support/table.rs"]
mod table;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use table::Table;
use turns::{
    Arguments, BACK_END_CORE, BenchDir, FRONT_END_CORE, Run, Turns, in_all_turns, in_turns, median,
};
use vringd::testing::probe::ProbeError;

/// How long a back-end may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of the files behind disks.
const FILE_BYTES: u64 = 1 << 30;

/// Bytes of a disk in memory.
const RAM_BYTES: u64 = 256 << 20;

/// Where blocks are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Medium {
    /// Nowhere.
    Null,
    /// In the back-end's own memory: only vringd has that.
    Ram,
    /// In a file of a file system in memory.
    Tmpfs,
    /// In a file of another file system, in the page cache.
    Cached,
    /// In the same file with O_DIRECT.
    Disk,
}

/// The head of the table beside other back-ends.
const OTHERS: &str = "| load, depth, rings | vringd | qemu-storage-daemon | fio | ratio to fio | \
                      ratio (range) | turns | probe |\n|---|---|---|---|---|---|---|---|";

/// The head of the table of options.
const OF_OPTIONS: &str = "| option: load, depth, rings | with | without | ratio (range) | turns | \
                          probe |\n|---|---|---|---|---|---|";

/// What stands for a key where one side has packed rings, the other split ones.
const PACKED: &str = "packed";

/// What stands for a key where the other side is a loop that copies.
const MEMCPY: &str = "memcpy";

/// A row of a table.
#[derive(Clone, Copy)]
struct Case {
    medium: Medium,
    rw: &'static str,
    depth: u32,
    format: &'static str,
    /// Queues, and what they are served by; spinning on a core of its own, if nothing is said.
    shared: Option<Shared>,
    /// Sleeps when there was nothing to do for a while.
    adaptive: bool,
    /// The key of vringd that one side has, and the other has not; or [`PACKED`],
    /// or [`MEMCPY`].
    option: Option<&'static str>,
}

/// A load on vringd alone, whose CPU time per request tells what several workers cost. They sleep
/// without work: one of them has the load's own core.
#[derive(Clone, Copy)]
struct Shared {
    queues: u32,
    cores: &'static str,
}

impl Case {
    fn new(medium: Medium, rw: &'static str, depth: u32, format: &'static str) -> Case {
        Case {
            medium,
            rw,
            depth,
            format,
            shared: None,
            adaptive: false,
            option: None,
        }
    }

    /// All rows, in the order of the tables.
    fn all() -> Vec<Case> {
        let mut cases = Case::beside_others();
        cases.extend(Case::packed_beside_split());
        cases.extend(["randread", "randwrite"].map(|rw| Case {
            option: Some(MEMCPY),
            ..Case::new(Medium::Ram, rw, 32, "packed")
        }));
        for option in ["fixed_buffers", "sqpoll"] {
            // Writes to the page cache end at the device, whenever the kernel likes.
            for (medium, rw) in [
                (Medium::Disk, "randread"),
                (Medium::Disk, "randwrite"),
                (Medium::Cached, "randread"),
            ] {
                cases.push(Case {
                    option: Some(option),
                    ..Case::new(medium, rw, 32, "split")
                });
            }
        }
        cases
    }

    fn packed_beside_split() -> impl Iterator<Item = Case> {
        use Medium::{Disk, Null, Ram, Tmpfs};
        let cases = [
            (Null, "randread", 1),
            (Null, "randread", 32),
            (Null, "randread", 128),
            (Ram, "randread", 32),
            (Ram, "randwrite", 32),
            (Tmpfs, "randread", 32),
            (Disk, "randread", 32),
        ];
        cases.into_iter().map(|(medium, rw, depth)| Case {
            option: Some(PACKED),
            ..Case::new(medium, rw, depth, "packed")
        })
    }

    fn beside_others() -> Vec<Case> {
        use Medium::{Cached, Disk, Null, Ram, Tmpfs};
        let case = Case::new;
        let mut cases = Vec::new();
        for format in ["split", "packed"] {
            for depth in [1, 32, 128] {
                cases.push(case(Null, "randread", depth, format));
            }
        }
        for (medium, format) in [(Ram, "packed"), (Tmpfs, "split")] {
            for rw in ["randread", "randwrite"] {
                cases.push(case(medium, rw, 32, format));
            }
        }
        cases.push(case(Cached, "randread", 32, "split"));
        for rw in ["randread", "randwrite"] {
            for depth in [1, 32, 128] {
                cases.push(case(Disk, rw, depth, "split"));
            }
        }
        for rw in ["randread", "randwrite"] {
            for depth in [1, 32] {
                cases.push(Case {
                    adaptive: true,
                    ..case(Disk, rw, depth, "split")
                });
            }
        }
        for (queues, cores) in [(1, "1"), (4, "1"), (4, "0,1")] {
            cases.push(Case {
                shared: Some(Shared { queues, cores }),
                ..case(Ram, "randread", 128, "packed")
            });
        }
        cases
    }

    fn name(&self) -> String {
        if let Some(option) = self.option {
            let medium = match self.medium {
                Medium::Cached => "page cache",
                Medium::Disk => "O_DIRECT",
                Medium::Null => "null",
                Medium::Ram => "ram",
                Medium::Tmpfs => "tmpfs",
            };
            let (rw, depth) = (self.rw, self.depth);
            let format = match option {
                PACKED | MEMCPY => "",
                _ => " split",
            };
            return format!("{option}: {medium} {rw} {depth}{format}");
        }
        let medium = match self.medium {
            Medium::Null => "null",
            Medium::Ram => "ram",
            Medium::Tmpfs => "tmpfs file",
            Medium::Cached => "cached file",
            Medium::Disk => "disk file, O_DIRECT",
        };
        let name = format!("{medium} {} {} {}", self.rw, self.depth, self.format);
        match self.shared {
            None if self.adaptive => format!("{name}, adaptive"),
            None => name,
            Some(Shared { queues, cores }) => {
                format!("{name}, {queues} queues on cores {cores}, interrupt")
            }
        }
    }

    /// Who takes part: what the others don't have is measured alone.
    fn peers(&self) -> &'static [Peer] {
        match self.option {
            Some(MEMCPY) => return &[Peer::Vringd, Peer::Memcpy],
            Some(_) => return &[Peer::Vringd, Peer::Without],
            None => {}
        }
        match (self.medium, self.format) {
            (_, "packed") | (Medium::Ram, _) => &[Peer::Vringd],
            (Medium::Disk, _) => &[Peer::Vringd, Peer::Qemu, Peer::Fio],
            _ => &[Peer::Vringd, Peer::Qemu],
        }
    }
}

/// Who does the I/O.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Vringd,
    /// The same without the row's option.
    Without,
    /// A loop that copies.
    Memcpy,
    Qemu,
    Fio,
}

impl Peer {
    /// The rings' format in this row.
    fn format(self, case: &Case) -> &'static str {
        match (self, case.option) {
            (Peer::Without, Some(PACKED)) => "split",
            _ => case.format,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Peer::Vringd => "vringd",
            Peer::Without => "without",
            Peer::Memcpy => "memcpy",
            Peer::Qemu => "qemu-storage-daemon",
            Peer::Fio => "fio",
        }
    }
}

/// What the command line asks for.
struct Options {
    rows: Vec<Case>,
    pairs: usize,
    seconds: u32,
    dir: PathBuf,
    write: bool,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let arguments = Arguments::parse(args, &["--dir"])?;
        let target = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let options = Self {
            rows: arguments.rows(Case::all(), Case::name)?,
            pairs: arguments.pairs,
            seconds: arguments.seconds,
            dir: arguments.value("--dir").map_or_else(target, PathBuf::from),
            write: arguments.write,
        };
        Ok(options)
    }
}

/// The files that disks are made of.
struct Files {
    sockets: BenchDir,
    tmpfs: BenchDir,
    disk: BenchDir,
}

impl Files {
    fn new(options: &Options) -> std::io::Result<Self> {
        let files = Self {
            sockets: BenchDir::new(&std::env::temp_dir())?,
            tmpfs: BenchDir::new(Path::new("/dev/shm"))?,
            disk: BenchDir::new(&options.dir)?,
        };
        let wanted = |media: &[Medium]| {
            let mut rows = options.rows.iter();
            rows.any(|case| media.contains(&case.medium))
        };
        use Medium::{Cached, Disk, Tmpfs};
        for media in [&[Tmpfs][..], &[Disk, Cached]] {
            if wanted(media) {
                // Written once, so that no run meets blocks that have no place yet.
                let mut file = File::create(files.path(media[0]))?;
                let block = vec![0x5a; 1 << 20];
                for _ in 0..FILE_BYTES >> 20 {
                    file.write_all(&block)?;
                }
                file.sync_all()?;
            }
        }
        Ok(files)
    }

    fn path(&self, medium: Medium) -> PathBuf {
        match medium {
            Medium::Tmpfs => self.tmpfs.path("disk"),
            _ => self.disk.path("disk"),
        }
    }
}

/// A back-end; ended when dropped.
struct BackEnd(Child);

impl BackEnd {
    fn start(peer: Peer, case: &Case, files: &Files, socket: &Path) -> Self {
        let path = files.path(case.medium).display().to_string();
        let socket_name = socket.display();
        let mut command = match peer {
            Peer::Qemu => {
                let node = match case.medium {
                    Medium::Null | Medium::Ram => {
                        format!("driver=null-co,size={FILE_BYTES},read-zeroes=off")
                    }
                    Medium::Tmpfs | Medium::Cached => {
                        format!("driver=file,filename={path},aio=io_uring")
                    }
                    Medium::Disk => {
                        format!("driver=file,filename={path},aio=io_uring,cache.direct=on")
                    }
                };
                let mut command = Command::new("taskset");
                command.args(["-c", &BACK_END_CORE.to_string(), "qemu-storage-daemon"]);
                // Beside a worker that sleeps: one that polls as long as it does by default.
                let polls = if case.adaptive {
                    ""
                } else {
                    ",poll-max-ns=1000000000"
                };
                command.args(["--object", &format!("iothread,id=io0{polls}")]);
                command.arg("--blockdev").arg(format!("{node},node-name=d"));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,\
                     addr.path={socket_name},writable=on,iothread=io0"
                ));
                command
            }
            _ => {
                let backend = match case.medium {
                    Medium::Null => format!("backend=null:{FILE_BYTES}"),
                    Medium::Ram => format!("backend=ram:{RAM_BYTES}"),
                    Medium::Tmpfs | Medium::Cached => format!("path={path},direct=false"),
                    Medium::Disk => format!("path={path},direct=true"),
                };
                let option = case.option.filter(|_| peer == Peer::Vringd);
                let option = option.filter(|option| ![PACKED, MEMCPY].contains(option));
                let option = option.map_or(String::new(), |option| format!(",{option}=on"));
                let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
                let own = BACK_END_CORE.to_string();
                let (idle, cores) = match case.shared {
                    None if case.adaptive => ("adaptive", own.as_str()),
                    None => ("spin", own.as_str()),
                    Some(Shared { cores, .. }) => ("interrupt", cores),
                };
                command.args(["run", "--log-level", "warn", "--idle", idle]);
                command.args(["--core", cores, "--blk"]);
                command.arg(format!("name=d0,socket={socket_name},{backend}{option}"));
                command
            }
        };
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = quiet.spawn().expect("scripts/bench installs what is run");
        let mut back_end = Self(child);
        let deadline = Instant::now() + START_TIMEOUT;
        while !socket.exists() {
            let ended = back_end.0.try_wait().expect("a child of ours");
            let in_time = ended.is_none() && Instant::now() < deadline;
            assert!(in_time, "no socket at {socket_name}: {ended:?}");
            thread::yield_now();
        }
        back_end
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Nothing is at stake: its socket goes with the directory.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a run found.
#[derive(Clone, Copy)]
struct Rate {
    /// Thousand requests per second.
    kiops: f64,
    /// Median latency.
    p50_us: f64,
    /// The back-end's CPU time per request.
    cpu_us: f64,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rate { kiops, p50_us, .. } = self;
        write!(f, "{kiops:.1} K IOPS, p50 {p50_us:.2} µs")
    }
}

fn run(peer: Peer, case: &Case, options: &Options, files: &Files) -> Rate {
    match peer {
        Peer::Fio => return run_fio(case, options, files),
        Peer::Memcpy => return memcpy::run(case.rw == "randread", options.seconds),
        _ => {}
    }
    let socket = files.sockets.fresh_socket();
    let back_end = BackEnd::start(peer, case, files, &socket);
    let front_end = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
        command
            .args(["bench", "blk", "--json", "--socket"])
            .arg(&socket);
        command
    };
    if case.medium == Medium::Ram {
        // Pages that were never written are all the same one, and cost a fault to write.
        object_of(front_end().args(["--rw", "write", "--bs", "1m", "--loops", "1"]));
    }
    let queues = case.shared.map_or(1, |shared| shared.queues);
    // Drivers of guests write descriptors anew in both formats.
    let rewrite = (case.option == Some(PACKED)).then_some("--rewrite");
    let found = object_of(
        front_end()
            .args(rewrite)
            .args(["--event-idx", "--rw", case.rw])
            .args(["--format", peer.format(case)])
            .args(["--queues", &queues.to_string(), "--threads", "1"])
            .args(["--iodepth", &(case.depth / queues).to_string()])
            .args(["--runtime", &options.seconds.to_string()])
            .args(["--cpus-allowed", &FRONT_END_CORE.to_string()])
            .args(["--pid", &back_end.0.id().to_string()]),
    );
    let kind = case.rw.trim_start_matches("rand");
    let value = |value: &Value| value.as_f64().expect("a number in the report");
    Rate {
        kiops: value(&found["iops"]) / 1e3,
        p50_us: value(&found[kind]["latency_ns"]["p50"]) / 1e3,
        cpu_us: value(&found["backend_cpu_ns_per_request"]) / 1e3,
    }
}

fn run_fio(case: &Case, options: &Options, files: &Files) -> Rate {
    let found = object_of(
        Command::new("taskset")
            .args(["-c", &BACK_END_CORE.to_string(), "fio", "--name=bench"])
            .args(["--ioengine=io_uring", "--direct=1", "--bs=4k"])
            .arg("--registerfiles=1")
            .args(["--time_based", "--output-format=json", "--ramp_time=250ms"])
            .arg(format!("--filename={}", files.path(case.medium).display()))
            .arg(format!("--rw={}", case.rw))
            .arg(format!("--iodepth={}", case.depth))
            .arg(format!("--runtime={}", options.seconds)),
    );
    let job = &found["jobs"][0];
    let kind = &job[case.rw.trim_start_matches("rand")];
    let value = |value: &Value| value.as_f64().expect("a number in fio's report");
    let iops = value(&kind["iops"]);
    let cores = (value(&job["usr_cpu"]) + value(&job["sys_cpu"])) / 100.0;
    Rate {
        kiops: iops / 1e3,
        p50_us: value(&kind["clat_ns"]["percentile"]["50.000000"]) / 1e3,
        cpu_us: cores / iops * 1e6,
    }
}

/// The JSON object that a command prints; it has to succeed.
fn object_of(command: &mut Command) -> Value {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.expect("scripts/bench installs what is run");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// A line of the table.
struct Row {
    case: Case,
    turns: Turns<Rate>,
}

impl Row {
    fn cell(&self, peer: usize) -> String {
        if self.turns.runs[0].len() <= peer {
            return "–".to_owned();
        }
        let middle = |of: fn(&Rate) -> f64| median(self.turns.values(peer, of));
        format!(
            "{:.1} ({:.2}, {:.2})",
            middle(|rate| rate.kiops),
            middle(|rate| rate.p50_us),
            middle(|rate| rate.cpu_us),
        )
    }

    /// Over qemu-storage-daemon, where it takes part, or over vringd without the option (1), or
    /// over fio (2).
    fn ratio(&self, peer: usize) -> Option<(f64, (f64, f64))> {
        let both = self.turns.runs[0].len() > peer;
        both.then(|| self.turns.ratio(peer, |rate| rate.kiops))
    }

    fn ratio_cell(&self, peer: usize) -> String {
        match self.ratio(peer) {
            Some((ratio, (least, most))) => format!("{ratio:.2} ({least:.2}–{most:.2})"),
            None => "–".to_owned(),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = if self.case.option.is_some() { 2 } else { 3 };
        let mut cells: Vec<_> = (0..columns).map(|peer| self.cell(peer)).collect();
        cells.extend((1..columns).rev().map(|peer| self.ratio_cell(peer)));
        write!(
            f,
            "| {} | {} | {} | {}, {:.0} ns |",
            self.case.name(),
            cells.join(" | "),
            self.turns.runs.len(),
            self.turns.distance_name(),
            self.turns.probe_ns(),
        )
    }
}

fn measure(case: &Case, options: &Options, files: &Files) -> Result<Vec<Row>, ProbeError> {
    if case.medium == Medium::Cached {
        // Direct I/O on the same file has thrown out what was there.
        std::io::copy(
            &mut File::open(files.path(case.medium)).expect("made before"),
            &mut std::io::sink(),
        )
        .expect("a file that can be read");
    }
    let peers = case.peers();
    let names: Vec<String> = peers.iter().map(|peer| peer.name().to_owned()).collect();
    let one = |peer: usize| Run::between_probes(|| run(peers[peer], case, options, files));
    let classes = match case.medium {
        Medium::Disk => in_all_turns(&case.name(), options.pairs, &names, one)?,
        _ => in_turns(&case.name(), options.pairs, &names, one)?,
    };
    let seen = classes.into_iter().filter(|turns| !turns.runs.is_empty());
    let row = |turns| Row { case: *case, turns };
    Ok(seen.map(row).collect())
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let files = Files::new(options)?;
    let mut lines = [Vec::new(), Vec::new()];
    let mut complete = true;
    for case in &options.rows {
        let seen = measure(case, options, &files)?;
        complete &= seen.iter().any(|row| row.turns.runs.len() >= options.pairs);
        let new: Vec<_> = seen.iter().map(Row::to_string).collect();
        let of_options = case.option.is_some();
        if options.write {
            // At once: who ends a long measurement keeps what is done.
            write_docs(of_options, &new, options.pairs)?;
        }
        lines[usize::from(of_options)].extend(new);
    }
    for (head, lines) in [OTHERS, OF_OPTIONS].into_iter().zip(lines) {
        if !lines.is_empty() {
            println!("{head}\n{}", lines.join("\n"));
        }
    }
    Ok(complete)
}

/// What was measured takes the place of what stands there for the same loads.
fn write_docs(of_options: bool, new: &[String], pairs: usize) -> Result<(), String> {
    let all = Case::all();
    let at = |cells: &[&str]| all.iter().position(|case| case.name() == cells[0]);
    let (name, head, title) = if of_options {
        let title = "Requests per second, vringd / what is beside it";
        ("blk-options", OF_OPTIONS, title)
    } else {
        let title = "Requests per second, vringd / qemu-storage-daemon";
        ("blk", OTHERS, title)
    };
    let table = Table {
        name,
        head,
        title,
        pairs,
    };
    table.write(new, at, |cells| {
        let panel = match at(cells).map(|at| all[at].medium) {
            Some(Medium::Null) => "no medium",
            Some(Medium::Ram) => "memory",
            _ => "files",
        };
        (panel.to_owned(), cells[0].to_owned())
    })
}

fn main() -> ExitCode {
    turns::run_bench(
        "blk",
        "turns",
        Options::parse,
        |options| options.dir.clone(),
        bench,
    )
}
