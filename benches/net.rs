//! What network links move, beside DPDK's, in turns.
//!
//! vringd and DPDK's testpmd with `net_vhost` on core 1 are given the same load from core 0
//! alternately. Each run stands between two measurements of the cache-line round trip between the
//! cores, as in `rings`. What carries over to other machines is the ratio.
//!
//! - `wire`, `switch`: two ports, whose front-ends one testpmd loops, both directions together;
//!   DPDK forwards between two `net_vhost` ports.
//! - `tap`, `xdp`: testpmd sends all that it can; counted are the frames that arrive at the tap, or
//!   at the other end of the cable (a veth pair), where the kernel drops them. DPDK forwards from
//!   `net_vhost` to `net_tap` or `net_af_xdp`.
//! - `pingpong`: the round trip of one frame of `vringd bench net`: through an echo, through a wire
//!   and back, or through a tap in a bridge which sends every frame back to the port it came from.
//!   vringd's worker spins, or is adaptive; DPDK always spins.
//!
//! `scripts/bench net [ROW…] [--pairs N] [--seconds S] [--size BYTES] [--write]`, where a ROW is
//! part of a row's name: `wire`, `"wire 64"`, `pingpong`. `--size` measures frames of that size
//! only. `--write` measures all rows and puts table and chart into docs/performance.md.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/net.rs"]
mod net;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use net::{BackEnd, Link, Load, Mpps, vhost};
use serde_json::Value;
use support::netns::Netns;
use support::testpmd::{self, RingPath};
use turns::{BenchDir, FRONT_END_CORE, Run, Turns, in_turns, median};
use vringd::testing::probe::ProbeError;

/// Frames that fill a ring.
const FRAMES: u32 = 1024;

/// The interface that frames go to, in a namespace of each run's own.
const INTERFACE: &str = "bench0";

/// The other end of its cable, if it has one.
const FAR_END: &str = "bench1";

/// Where frames go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through the back-end's ports and back to the front-end.
    Ports(Link),
    /// To a tap.
    Tap,
    /// To an interface, through AF_XDP.
    Xdp,
}

/// A row of the table.
#[derive(Clone, Copy)]
struct Case {
    way: Way,
    /// One frame at a time, there and back, with this idle policy; else as many as there can be.
    pingpong: Option<&'static str>,
    /// Bytes of a frame.
    size: u32,
    path: RingPath,
}

impl Case {
    /// All rows, in the order of the table; with a size, those that count frames have that one.
    fn all(size: Option<u32>) -> Vec<Case> {
        let path = |number| RingPath::number(number).expect("there are ten");
        let [packed, split] = [1, 5].map(path);
        let case = |way, size, path| Case {
            way,
            pingpong: None,
            size,
            path,
        };
        let mut cases = Vec::new();
        for way in [Link::Wire, Link::Switch].map(Way::Ports) {
            for size in size.map_or(vec![64, 1518], |size| vec![size]) {
                cases.extend([packed, split].map(|path| case(way, size, path)));
            }
        }
        let size = size.unwrap_or(64);
        cases.extend([Way::Tap, Way::Xdp].map(|way| case(way, size, packed)));
        for way in [Way::Ports(Link::Echo), Way::Ports(Link::Wire), Way::Tap] {
            cases.extend(["spin", "adaptive"].map(|idle| Case {
                pingpong: Some(idle),
                ..case(way, 64, packed)
            }));
        }
        cases
    }

    fn name(&self) -> String {
        let way = match self.way {
            Way::Ports(link) => link.name(),
            Way::Tap => "tap",
            Way::Xdp => "xdp",
        };
        let format = if self.path.packed { "packed" } else { "split" };
        match self.pingpong {
            Some(idle) => format!("pingpong {way} {idle}"),
            None => format!("{way} {} {format}", self.size),
        }
    }

    /// What DPDK's back-end is called: its drivers.
    fn peer(&self) -> &'static str {
        match self.way {
            Way::Ports(_) => "net_vhost",
            Way::Tap => "net_vhost, net_tap",
            Way::Xdp => "net_vhost, net_af_xdp",
        }
    }

    /// The part of the chart that it is in.
    fn panel(&self) -> &'static str {
        match (self.pingpong, self.way) {
            (Some(_), _) => "round trips, one frame",
            (None, Way::Ports(_)) => "between guests",
            (None, Way::Tap | Way::Xdp) => "guest to host",
        }
    }

    fn sockets(&self, dir: &BenchDir) -> Vec<PathBuf> {
        match self.way {
            Way::Ports(link) => link.sockets(dir),
            Way::Tap | Way::Xdp => vec![dir.fresh_socket()],
        }
    }

    fn vringd(&self, sockets: &[PathBuf], netns: &Netns) -> BackEnd {
        let options = match self.way {
            Way::Ports(link) => link.options(),
            Way::Tap => &["link=tap:bench0"],
            Way::Xdp => &["link=xdp:bench0"],
        };
        let command = netns.command(env!("CARGO_BIN_EXE_vringd"));
        BackEnd::vringd(command, self.pingpong.unwrap_or("spin"), options, sockets)
    }

    fn dpdk(&self, sockets: &[PathBuf], netns: &Netns) -> BackEnd {
        let mut config = vhost(sockets);
        config.netns = Some(netns.name().to_owned());
        config.vdevs.extend(match self.way {
            Way::Ports(_) => None,
            Way::Tap => Some(format!("net_tap0,iface={INTERFACE}")),
            Way::Xdp => Some(format!("net_af_xdp0,iface={INTERFACE}")),
        });
        BackEnd::dpdk(&config, sockets)
    }
}

/// What the command line asks for.
struct Options {
    rows: Vec<Case>,
    pairs: usize,
    seconds: u32,
    write: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut pairs, mut seconds, mut write, mut size) = (5, 1, false, None);
        let mut parts = Vec::new();
        while let Some(arg) = args.next() {
            let mut number = || {
                let value = args.next().unwrap_or_default();
                let number = value.parse::<u32>().ok().filter(|&number| number > 0);
                number.ok_or(format!("{arg} takes a number above 0, not {value:?}"))
            };
            match arg.as_str() {
                "--pairs" => pairs = number()? as usize,
                "--seconds" => seconds = number()?,
                "--size" => size = Some(number()?),
                "--write" => write = true,
                // Added by cargo.
                "--bench" => {}
                _ => parts.push(arg),
            }
        }
        if let Some(size) = size.filter(|size| !(60..=1518).contains(size)) {
            return Err(format!("--size is 60 to 1518 bytes, not {size}"));
        }
        if write && (size.is_some() || !parts.is_empty()) {
            return Err("--write measures all rows as they are".to_owned());
        }
        let all = Case::all(size);
        let is_part = |part: &String| all.iter().any(|case| case.name().contains(part.as_str()));
        if let Some(part) = parts.iter().find(|part| !is_part(part)) {
            return Err(format!("{part:?} is neither an option nor in a row's name"));
        }
        let wanted = |case: &Case| {
            let name = case.name();
            parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()))
        };
        Ok(Self {
            rows: all.into_iter().filter(wanted).collect(),
            pairs,
            seconds,
            write,
        })
    }
}

/// What a run found.
#[derive(Clone, Copy)]
enum Found {
    Rate(Mpps),
    /// Round trips of a frame.
    Times {
        p50_us: f64,
        p99_us: f64,
    },
}

impl Found {
    /// What is greater the faster it is: frames per microsecond, or in a row.
    fn speed(&self) -> f64 {
        match self {
            Self::Rate(mpps) => mpps.0,
            Self::Times { p50_us, .. } => 1.0 / p50_us,
        }
    }

    /// What nearly all round trips take at most; a rate has none.
    fn p99_us(&self) -> f64 {
        match *self {
            Self::Rate(_) => f64::NAN,
            Self::Times { p99_us, .. } => p99_us,
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(mpps) => mpps.fmt(f),
            Self::Times { p50_us, p99_us } => write!(f, "p50 {p50_us:.2}, p99 {p99_us:.2} µs"),
        }
    }
}

/// A namespace with a cable in it, for those who need one.
fn namespace(way: Way) -> Netns {
    let netns = Netns::new();
    // The kernel's own frames are not part of the load.
    netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    if way == Way::Xdp {
        netns.ok(&format!(
            "ip link add {INTERFACE} type veth peer name {FAR_END} && \
             ip link set {INTERFACE} up && ip link set {FAR_END} up"
        ));
    }
    netns
}

fn run(ours: bool, case: &Case, options: &Options, dir: &BenchDir) -> Found {
    let netns = namespace(case.way);
    let sockets = case.sockets(dir);
    let back_end = if ours {
        case.vringd(&sockets, &netns)
    } else {
        case.dpdk(&sockets, &netns)
    };
    if case.pingpong.is_some() {
        if case.way == Way::Tap {
            reflect(&netns);
        }
        let found = ping_pong(&sockets, options.seconds);
        drop(back_end);
        return found;
    }
    let load = Load {
        path: &case.path,
        size: case.size,
        frames: FRAMES,
        time: Duration::from_secs(options.seconds.into()),
    };
    Found::Rate(match case.way {
        Way::Ports(_) => net::looped(back_end, &sockets, load),
        Way::Tap => net::flooded(back_end, &sockets[0], load, INTERFACE),
        Way::Xdp => net::flooded(back_end, &sockets[0], load, FAR_END),
    })
}

/// Has every frame that comes out of the tap sent back to it.
fn reflect(netns: &Netns) {
    netns.ok(&format!(
        "ip link add br0 type bridge && ip link set br0 up && \
         ip link set {INTERFACE} master br0 && \
         ip link set {INTERFACE} type bridge_slave hairpin on"
    ));
}

/// Round trips, to the other end and back where there are two sockets.
fn ping_pong(sockets: &[PathBuf], seconds: u32) -> Found {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
    command
        .args(["bench", "net", "--json", "--mode", "pingpong"])
        .args(["--format", "packed", "--core", &FRONT_END_CORE.to_string()])
        .args(["--duration", &format!("{seconds}s")]);
    for (flag, socket) in ["--socket", "--far"].into_iter().zip(sockets) {
        command.arg(flag).arg(socket);
    }
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.expect("vringd was built with this bench");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let us = |which: &str| {
        let ns = found["latency_ns"][which].as_f64();
        ns.expect("a number in the report") / 1e3
    };
    Found::Times {
        p50_us: us("p50"),
        p99_us: us("p99"),
    }
}

/// A line of the table.
struct Row {
    case: Case,
    turns: Turns<Found>,
}

impl Row {
    /// The middle of what a peer brought.
    fn middle(&self, peer: usize) -> Found {
        let middle = |of: fn(&Found) -> f64| median(self.turns.values(peer, of));
        match self.turns.runs[0][peer].value {
            Found::Rate(_) => Found::Rate(Mpps(middle(Found::speed))),
            Found::Times { .. } => Found::Times {
                p50_us: middle(|found| 1.0 / found.speed()),
                p99_us: middle(Found::p99_us),
            },
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [ours, theirs] = [0, 1].map(|peer| self.middle(peer));
        let (ratio, (least, most)) = self.turns.ratio(Found::speed);
        write!(
            f,
            "| {} | {ours} | {theirs} ({}) | {ratio:.2} ({least:.2}–{most:.2}) | {} | \
             {}, {:.0} ns |",
            self.case.name(),
            self.case.peer(),
            self.turns.runs.len(),
            self.turns.distance.name(),
            self.turns.probe_ns(),
        )
    }
}

fn measure(case: &Case, options: &Options, dir: &BenchDir) -> Result<Vec<Row>, ProbeError> {
    let names = ["vringd".to_owned(), case.peer().to_owned()];
    let classes = in_turns(&case.name(), options.pairs, &names, |peer| {
        Run::between_probes(|| run(peer == 0, case, options, dir))
    })?;
    let seen = classes.into_iter().filter(|turns| !turns.runs.is_empty());
    Ok(seen.map(|turns| Row { case: *case, turns }).collect())
}

fn bench(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let dir = BenchDir::new(&std::env::temp_dir())?;
    let mut rows = Vec::new();
    let mut complete = true;
    for case in &options.rows {
        let seen = measure(case, options, &dir)?;
        complete &= seen.iter().any(|row| row.turns.runs.len() >= options.pairs);
        rows.extend(seen);
    }
    let mut table = "| load | vringd | DPDK | ratio (range) | pairs | probe |\n\
                     |---|---|---|---|---|---|\n"
        .to_owned();
    for row in &rows {
        table.push_str(&format!("{row}\n"));
    }
    print!("{table}");
    if options.write {
        write_docs(&table, &rows, options.pairs)?;
    }
    Ok(complete)
}

/// The chart has the rows with all pairs.
fn write_docs(table: &str, rows: &[Row], pairs: usize) -> Result<(), String> {
    let complete = rows.iter().filter(|row| row.turns.runs.len() >= pairs);
    let bar = |row: &Row| {
        let (ratio, range) = row.turns.ratio(Found::speed);
        chart::Bar {
            panel: row.case.panel().to_owned(),
            label: format!("{} ({})", row.case.name(), row.turns.distance.name()),
            ratio,
            range,
        }
    };
    let bars: Vec<_> = complete.map(bar).collect();
    let title = "Frames per second, or round trips, vringd / DPDK";
    turns::write_docs("net", table, &chart::svg(title, &bars))
}

fn main() -> ExitCode {
    turns::run_bench("net", "pairs", Options::parse, bench)
}
