//! What network links move, beside DPDK's, in turns.
//!
//! vringd and DPDK's testpmd with `net_vhost` on core 1 are given the same load from core 0
//! alternately. Each run stands between two measurements of the cache-line round trip between the
//! cores, as in `rings`. What carries over to other machines is the ratio.
//!
//! - `wire`, `switch`: two ports, whose front-ends one testpmd loops, both directions together;
//!   DPDK forwards between two `net_vhost` ports.
//! - `wire … ovs`: the same beside Open vSwitch with DPDK, whose one polling thread has core 1,
//!   with a flow from each port to the other.
//! - `switch beside wire`: a switch with two ports beside a wire, both ours.
//! - `tap`, `xdp`: testpmd sends all that it can; counted are the frames that arrive at the tap, or
//!   at the other end of the cable (a veth pair), where the kernel drops them. DPDK forwards from
//!   `net_vhost` to `net_tap` or `net_af_xdp`.
//! - `from xdp`: the other way. A generator sends frames into the far end of the cable, a burst at
//!   a time with pauses in which testpmd, on the same core, receives them from the back-end.
//! - `pingpong`: the round trip of one frame of `vringd bench net`: through an echo, through a wire
//!   and back, or through a tap in a bridge which sends every frame back to the port it came from.
//!   vringd's worker spins, or is adaptive; DPDK always spins.
//! - `tap 65535 tso`: bytes that a tap takes per second of the daemon's CPU time, in TCP frames
//!   that the kernel may cut when it has to, beside frames of 1514 bytes from the same front-end.
//!
//! `scripts/bench net [ROW…] [--pairs N] [--seconds S] [--size BYTES] [--write]`, where a ROW is
//! part of a row's name: `wire`, `"wire 64"`, `pingpong`. `--size` measures frames of that size
//! only. `--write` puts what was measured into the table and the chart of docs/performance.md.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/net.rs"]
mod net;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "support/table.rs"]
mod table;
#[path = "support/turns.rs"]
mod turns;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use net::{BackEnd, Link, Load, Mpps, vhost};
use serde_json::Value;
use support::netns::Netns;
use support::ovs::{Ovs, OvsConfig};
use support::testpmd::{self, RingPath};
use table::Table;
use turns::{Arguments, BACK_END_CORE, BenchDir, FRONT_END_CORE, Run, Turns, in_turns, median};
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
    /// From there.
    FromXdp,
}

/// What is measured of them, and beside whom.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// Frames, as many as there can be, beside DPDK's drivers.
    Frames,
    /// The same beside Open vSwitch.
    BesideOvs,
    /// The same beside a wire of ours.
    BesideWire,
    /// Bytes in frames that the kernel may cut, sent by our own front-end, beside those that are
    /// short already.
    Bytes,
    /// One frame at a time, there and back, with this idle policy of ours.
    RoundTrip(&'static str),
}

/// A row of the table.
#[derive(Clone, Copy)]
struct Case {
    way: Way,
    what: What,
    /// Bytes of a frame.
    size: u32,
    path: RingPath,
}

impl Case {
    /// All rows, in the order of the table; with a size, those that count frames have that one.
    fn all(size: Option<u32>) -> Vec<Case> {
        let path = |number| RingPath::number(number).expect("there are ten");
        let [packed, split] = [1, 5].map(path);
        let case = |what, way, size, path| Case {
            way,
            what,
            size,
            path,
        };
        let mut cases = Vec::new();
        for (what, link) in [
            (What::Frames, Link::Wire),
            (What::BesideOvs, Link::Wire),
            (What::Frames, Link::Switch),
            (What::BesideWire, Link::Switch),
        ] {
            for size in size.map_or(vec![64, 1518], |size| vec![size]) {
                let case = |path| case(what, Way::Ports(link), size, path);
                cases.extend([packed, split].map(case));
            }
        }
        let size = size.unwrap_or(64);
        let to_host = [Way::Tap, Way::Xdp, Way::FromXdp];
        cases.extend(to_host.map(|way| case(What::Frames, way, size, packed)));
        cases.push(case(What::Bytes, Way::Tap, 65535, packed));
        for way in [Way::Ports(Link::Echo), Way::Ports(Link::Wire), Way::Tap] {
            let idle = ["spin", "adaptive"].map(What::RoundTrip);
            cases.extend(idle.map(|what| case(what, way, 64, packed)));
        }
        cases
    }

    fn name(&self) -> String {
        let way = match self.way {
            Way::Ports(link) => link.name(),
            Way::Tap => "tap",
            Way::Xdp => "xdp",
            Way::FromXdp => "from xdp",
        };
        let format = if self.path.packed { "packed" } else { "split" };
        match self.what {
            What::Frames => format!("{way} {} {format}", self.size),
            What::BesideOvs => format!("{way} {} {format} ovs", self.size),
            What::BesideWire => format!("{way} beside wire {} {format}", self.size),
            What::Bytes => format!("{way} {} tso", self.size),
            What::RoundTrip(idle) => format!("pingpong {way} {idle}"),
        }
    }

    /// What is beside us.
    fn peer(&self) -> &'static str {
        match (self.what, self.way) {
            (What::Bytes, _) => "vringd, 1514 bytes",
            (What::BesideOvs, _) => "OVS-DPDK",
            (What::BesideWire, _) => "vringd, wire",
            (_, Way::Ports(_)) => "net_vhost",
            (_, Way::Tap) => "net_vhost, net_tap",
            (_, Way::Xdp | Way::FromXdp) => "net_vhost, net_af_xdp",
        }
    }

    /// The part of the chart that it is in.
    fn panel(&self) -> &'static str {
        match (self.what, self.way) {
            (What::Bytes, _) => "bytes per second of CPU time, beside 1514-byte frames",
            (What::RoundTrip(_), _) => "round trips, one frame",
            (What::BesideOvs, _) => "between guests, beside OVS-DPDK",
            (What::BesideWire, _) => "between guests, a switch beside a wire",
            (What::Frames, Way::Ports(_)) => "between guests",
            (What::Frames, Way::Tap | Way::Xdp) => "guest to host",
            (What::Frames, Way::FromXdp) => "host to guest",
        }
    }

    /// How the worker waits for frames.
    fn idle(&self) -> &'static str {
        match self.what {
            What::RoundTrip(idle) => idle,
            _ => "spin",
        }
    }

    fn sockets(&self, dir: &BenchDir) -> Vec<PathBuf> {
        match self.way {
            Way::Ports(link) => link.sockets(dir),
            _ => vec![dir.fresh_socket()],
        }
    }

    fn vringd(&self, way: Way, sockets: &[PathBuf], netns: &Netns) -> BackEnd {
        let options = match way {
            Way::Ports(link) => link.options(),
            Way::Tap => &["link=tap:bench0"],
            Way::Xdp | Way::FromXdp => &["link=xdp:bench0"],
        };
        let command = netns.command(env!("CARGO_BIN_EXE_vringd"));
        BackEnd::vringd(command, self.idle(), options, sockets)
    }

    fn dpdk(&self, sockets: &[PathBuf], netns: &Netns) -> BackEnd {
        let mut config = vhost(sockets);
        config.netns = Some(netns.name().to_owned());
        config.vdevs.extend(match self.way {
            Way::Ports(_) => None,
            Way::Tap => Some(format!("net_tap0,iface={INTERFACE}")),
            Way::Xdp | Way::FromXdp => Some(format!("net_af_xdp0,iface={INTERFACE}")),
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
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let arguments = Arguments::parse(args, &["--size"])?;
        let size = arguments.number("--size")?;
        if let Some(size) = size.filter(|size| !(60..=1518).contains(size)) {
            return Err(format!("--size is 60 to 1518 bytes, not {size}"));
        }
        if arguments.write && size.is_some() {
            return Err("--write measures rows as they are".to_owned());
        }
        Ok(Self {
            rows: arguments.rows(Case::all(size), Case::name)?,
            pairs: arguments.pairs,
            seconds: arguments.seconds,
            write: arguments.write,
        })
    }
}

/// What a run found.
#[derive(Clone, Copy)]
enum Found {
    Rate(Mpps),
    /// And how many there were to be taken.
    Part {
        taken: Mpps,
        sent: Mpps,
    },
    /// Bytes per nanosecond of the back-end's CPU time.
    Bytes(f64),
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
            Self::Rate(mpps) | Self::Part { taken: mpps, .. } => mpps.0,
            Self::Bytes(per_ns) => *per_ns,
            Self::Times { p50_us, .. } => 1.0 / p50_us,
        }
    }

    /// What nearly all round trips take at most; a rate has none.
    fn p99_us(&self) -> f64 {
        match *self {
            Self::Times { p99_us, .. } => p99_us,
            _ => f64::NAN,
        }
    }

    /// Frames that there were, where they are counted apart.
    fn sent(&self) -> f64 {
        match self {
            Self::Part { sent, .. } => sent.0,
            _ => f64::NAN,
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(mpps) => mpps.fmt(f),
            Self::Part { taken, sent } => write!(f, "{:.2} of {sent}", taken.0),
            Self::Bytes(per_ns) => write!(f, "{per_ns:.2} GB per CPU second"),
            Self::Times { p50_us, p99_us } => write!(f, "p50 {p50_us:.2}, p99 {p99_us:.2} µs"),
        }
    }
}

/// A namespace with a cable in it, for those who need one.
fn namespace(way: Way) -> Netns {
    let netns = Netns::new();
    // The kernel's own frames are not part of the load.
    netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    if matches!(way, Way::Xdp | Way::FromXdp) {
        netns.ok(&format!(
            "ip link add {INTERFACE} type veth peer name {FAR_END} && \
             ip link set {INTERFACE} up && ip link set {FAR_END} up"
        ));
    }
    netns
}

fn run(ours: bool, case: &Case, options: &Options, dir: &BenchDir) -> Found {
    let load = Load {
        path: &case.path,
        size: case.size,
        frames: FRAMES,
        time: Duration::from_secs(options.seconds.into()),
        listens: false,
    };
    if !ours && case.what == What::BesideOvs {
        return Found::Rate(through_ovs(load));
    }
    let netns = namespace(case.way);
    let sockets = case.sockets(dir);
    let back_end = match case.what {
        What::BesideWire if !ours => case.vringd(Way::Ports(Link::Wire), &sockets, &netns),
        What::Bytes => case.vringd(case.way, &sockets, &netns),
        _ if ours => case.vringd(case.way, &sockets, &netns),
        _ => case.dpdk(&sockets, &netns),
    };
    match (case.what, case.way) {
        (What::RoundTrip(_), way) => {
            if way == Way::Tap {
                reflect(&netns);
            }
            ping_pong(&sockets, options.seconds)
        }
        (What::Bytes, _) => {
            let size = if ours { case.size } else { 1514 };
            bytes_taken(&back_end, &sockets[0], size, options.seconds)
        }
        (_, Way::Ports(_)) => Found::Rate(net::looped(back_end, &sockets, load)),
        (_, Way::Tap) => Found::Rate(net::flooded(back_end, &sockets[0], load, INTERFACE)),
        (_, Way::Xdp) => Found::Rate(net::flooded(back_end, &sockets[0], load, FAR_END)),
        (_, Way::FromXdp) => {
            let mut generator = frames::sender(&netns, FAR_END, load.size, load.time);
            let [taken, sent] = net::fed(back_end, &sockets[0], load, INTERFACE, &mut generator);
            Found::Part { taken, sent }
        }
    }
}

/// What a switch of two ports takes, whose one polling thread has the back-end's core.
fn through_ovs(load: Load<'_>) -> Mpps {
    let ovs = Ovs::start(OvsConfig {
        alone_on: Some(BACK_END_CORE),
        ..OvsConfig::default()
    });
    ovs.add_bridge("br0");
    let names = ["a", "b"];
    names.iter().for_each(|name| ovs.add_back_end("br0", name));
    let flow = |from, to| format!("in_port=vb-{from},actions=output:vb-{to}");
    ovs.set_flows("br0", &[flow("a", "b"), flow("b", "a")]);
    let sockets = names.map(|name| ovs.socket(name));
    let load = Load {
        listens: true,
        ..load
    };
    net::looped(ovs, &sockets, load)
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
    let mut command = bench_net("pingpong", seconds);
    for (flag, socket) in ["--socket", "--far"].into_iter().zip(sockets) {
        command.arg(flag).arg(socket);
    }
    let found = report(&mut command);
    let us = |which: &str| {
        let ns = found["latency_ns"][which].as_f64();
        ns.expect("a number in the report") / 1e3
    };
    Found::Times {
        p50_us: us("p50"),
        p99_us: us("p99"),
    }
}

/// What a back-end takes of frames of `size` bytes, for its CPU time.
fn bytes_taken(back_end: &BackEnd, socket: &Path, size: u32, seconds: u32) -> Found {
    let mut command = bench_net("send", seconds);
    command
        .args(["--tso", "--ring-size", "256", "--size", &size.to_string()])
        .args(["--pid", &back_end.pid().to_string()])
        .arg("--socket")
        .arg(socket);
    let found = report(&mut command);
    let number = |which: &str| found[which].as_f64().expect("a number in the report");
    Found::Bytes(number("frames") * f64::from(size) / number("backend_cpu_ns"))
}

/// Our own front-end.
fn bench_net(mode: &str, seconds: u32) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
    command
        .args(["bench", "net", "--json", "--mode", mode])
        .args(["--format", "packed", "--core", &FRONT_END_CORE.to_string()])
        .args(["--duration", &format!("{seconds}s")]);
    command
}

/// What it reports.
fn report(command: &mut Command) -> Value {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.expect("vringd was built with this bench");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    serde_json::from_slice(&output.stdout).expect("one JSON object")
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
            Found::Part { .. } => Found::Part {
                taken: Mpps(middle(Found::speed)),
                sent: Mpps(middle(Found::sent)),
            },
            Found::Bytes(_) => Found::Bytes(middle(Found::speed)),
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
        let (ratio, (least, most)) = self.turns.ratio(1, Found::speed);
        write!(
            f,
            "| {} | {ours} | {theirs} ({}) | {ratio:.2} ({least:.2}–{most:.2}) | {} | \
             {}, {:.0} ns |",
            self.case.name(),
            self.case.peer(),
            self.turns.runs.len(),
            self.turns.distance_name(),
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
        let lines: Vec<_> = seen.iter().map(Row::to_string).collect();
        if options.write {
            // At once: who ends a long measurement keeps what is done.
            write_docs(&lines, options.pairs)?;
        }
        rows.extend(lines);
    }
    println!("{HEAD}\n{}", rows.join("\n"));
    Ok(complete)
}

/// The table's first lines.
const HEAD: &str = "| load | vringd | beside | ratio (range) | pairs | probe |\n\
                    |---|---|---|---|---|---|";

/// What was measured takes the place of what stands there for the same loads.
fn write_docs(new: &[String], pairs: usize) -> Result<(), String> {
    let all = Case::all(None);
    let at = |cells: &[&str]| all.iter().position(|case| case.name() == cells[0]);
    let table = Table {
        name: "net",
        head: HEAD,
        title: "Frames per second, or round trips, vringd / what is beside it",
        pairs,
    };
    table.write(new, at, |cells| {
        let panel = at(cells).map_or("", |at| all[at].panel());
        (panel.to_owned(), cells[0].to_owned())
    })
}

fn main() -> ExitCode {
    if let Some(sent) = frames::main() {
        return sent;
    }
    turns::run_bench(
        "net",
        "pairs",
        Options::parse,
        |_| std::env::temp_dir(),
        bench,
    )
}
