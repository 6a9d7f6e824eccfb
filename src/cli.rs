//! The command line: flags and their help. Nothing of clap leaves this file.
//!
//! Values of devices and of the engine are passed on as text: `config` understands them, in one
//! place for flags and file. Wrong usage ends with status 2, as a wrong configuration does.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{BenchBlkGiven, BenchNetGiven, Given, HelperGiven};
use crate::logging::Level;

const EXAMPLES: &str = "\
Examples:
  A disk from a file and a port on a tap interface, served by core 1:
    vringd run --core 1 \\
      --blk socket=/run/vringd/disk0.sock,path=disk.img \\
      --net socket=/run/vringd/net0.sock,link=tap:tap0

  The same from a file, checked first:
    vringd check --config /etc/vringd.toml
    vringd run --config /etc/vringd.toml";

const BENCH_EXAMPLES: &str = "\
Example:
  How many frames of 64 bytes core 1 forwards in a second, measured from core 0:
    vringd run --core 1 --idle spin --net socket=/tmp/n0.sock,link=echo &
    vringd bench net --socket /tmp/n0.sock --core 0 --pid $!";

const BENCH_BLK_EXAMPLES: &str = "\
Examples:
  How many reads of 4 KiB core 1 serves in a second, measured from core 0:
    vringd run --core 1 --idle spin --blk socket=/tmp/d0.sock,backend=null:1G &
    vringd bench blk --socket /tmp/d0.sock --rw randread --bs 4k --iodepth 32 \
      --format packed --cpus-allowed 0 --pid $!

  Write a whole disk and read every block of it back:
    vringd bench blk --socket /tmp/d0.sock --rw write --loops 1 --iodepth 8 --verify";

const HELPER_EXAMPLES: &str = "\
Example:
  A port with two queues on eth1, in a daemon without any capability:
    vringd xdp-helper --link xdp:eth1:fd=5+6:map=7 --user vringd -- \
      vringd run --core 1 --net socket=/run/vringd/net0.sock,link=xdp:eth1:fd=5+6:map=7";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// How much to log.
    pub log_level: Level,
    /// What to do.
    pub action: Action,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve the devices until a signal ends it.
    Run(Given),
    /// Say whether the settings are valid.
    Check(Given),
    /// Load a network back-end and print what it does.
    BenchNet(BenchNetGiven),
    /// Load a disk's back-end and print what it does.
    BenchBlk(Box<BenchBlkGiven>),
    /// Open what takes capabilities, give these up, and become another program.
    XdpHelper(HelperGiven),
}

/// A command line that leads to no action: wrong usage, or a request for help or the version.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CliError(clap::Error);

impl CliError {
    /// Prints the message, in colour where a terminal shows it: help and version to stdout,
    /// wrong usage to stderr.
    pub fn print(&self) {
        // There is nowhere left to report a closed stream to.
        let _ = self.0.print();
    }

    /// 0 after help and version, else 2.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if self.0.use_stderr() { 2 } else { 0 }
    }
}

/// Understands the arguments, the first being the program's name.
///
/// # Errors
/// Wrong usage; and help and version, which are not errors to the user.
pub fn parse<I>(arguments: I) -> Result<Invocation, CliError>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let cli = Cli::try_parse_from(arguments).map_err(CliError)?;
    let action = match cli.command {
        Command::Run(run) => Action::Run(Given {
            file: run.config,
            cores: run.core,
            idle: run.idle,
            placement: run.placement,
            stop_timeout: run.stop_timeout,
            nets: run.net,
            blks: run.blk,
            groups: run.group,
            switches: run.switch,
        }),
        Command::Check(check) => Action::Check(Given {
            file: Some(check.config),
            ..Given::default()
        }),
        Command::Bench(bench) => match bench.what {
            BenchCommand::Net(net) => Action::BenchNet(net.given()),
            BenchCommand::Blk(blk) => Action::BenchBlk(Box::new(blk.given())),
        },
        Command::XdpHelper(helper) => Action::XdpHelper(HelperGiven {
            links: helper.link,
            user: helper.user,
            busy_poll: helper.busy_poll,
            command: helper.command,
        }),
    };
    Ok(Invocation {
        log_level: cli.log_level,
        action,
    })
}

/// Serves virtio-net and virtio-blk devices to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "vringd", version, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    /// How much to log to stderr; VRINGD_LOG overrides it with a filter by module
    #[arg(long, global = true, value_name = "LEVEL", value_enum, default_value_t)]
    log_level: Level,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve devices until SIGTERM or SIGINT
    #[command(after_help = EXAMPLES)]
    Run(RunArgs),
    /// Say whether a configuration file is valid, and serve nothing
    Check(CheckArgs),
    /// Load a vhost-user back-end, be it vringd or another, and print what it does
    Bench(Box<BenchArgs>),
    /// Open AF_XDP sockets, give up all capabilities, and become a command that uses them
    #[command(after_help = HELPER_EXAMPLES)]
    XdpHelper(HelperArgs),
}

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
struct RunArgs {
    /// TOML file with [engine], [[net]], [[blk]], [[group]] and [[switch]]; its keys are those of
    /// the flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Cores to run on, one pinned worker each [default: the last that is online]
    #[arg(long, value_name = "N[,N]...")]
    core: Option<String>,

    /// What a worker without work does: spin, adaptive or interrupt [default: adaptive]
    #[arg(long, value_name = "POLICY")]
    idle: Option<String>,

    /// How workers are chosen for queues: spread or auto, near to the guest's memory
    /// [default: spread]
    #[arg(long, value_name = "HOW")]
    placement: Option<String>,

    /// How long a shutdown waits for requests in flight: 10s, 500ms [default: 10s]
    #[arg(long, value_name = "TIME")]
    stop_timeout: Option<String>,

    /// Add a network port; needs socket and link (tap:NAME, tap:fd=N, macvtap:NAME,
    /// xdp:IFACE, xdp:IFACE:fd=N:map=N, wire:PORT, switch:NAME, echo, sink).
    /// With host (tap:NAME, macvtap:NAME, xdp:IFACE) instead of socket: an interface at a switch.
    /// Also: name, mode, queues, netns, busy_poll, mac, mtu, link_follows, speed, duplex, cores,
    /// hold_us, ingress_bits, ingress_frames, egress_bits, egress_frames, rate_burst, vlan,
    /// vlan_native, isolated, flood_limit, allow_mac, allow_ip, stations, ring_reset,
    /// call_max_used, call_max_us, socket_owner, socket_group, socket_mode
    #[arg(long, value_name = "KEY=VALUE,...")]
    net: Vec<String>,

    /// Add a disk; needs socket, and path or backend (ram:SIZE, null:SIZE). Also: name, mode,
    /// format, backing_dir, queues, read_only, direct, cache, lock, fault, discard, encrypt,
    /// encrypt_sector, key_file, key_fd, serial, block_size, cores, ring_reset, call_max_used,
    /// call_max_us, socket_owner, socket_group, socket_mode, read_iops, write_iops, iops,
    /// read_bytes, write_bytes, bytes, rate_burst, group
    #[arg(long, value_name = "KEY=VALUE,...")]
    blk: Vec<String>,

    /// Add limits that the disks with group=NAME share; needs name. Also: read_iops, write_iops,
    /// iops, read_bytes, write_bytes, bytes, rate_burst
    #[arg(long, value_name = "KEY=VALUE,...")]
    group: Vec<String>,

    /// Choose for the switch of all ports with link=switch:NAME; needs name. Also: ageing
    #[arg(long, value_name = "KEY=VALUE,...")]
    switch: Vec<String>,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The TOML file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
struct HelperArgs {
    /// An interface, the numbers that its sockets get (one for each queue, from 0 on), and that of
    /// the map; several for as many interfaces
    #[arg(long, value_name = "xdp:IFACE:fd=N[+N]...[:map=N]", required = true)]
    link: Vec<String>,

    /// Run the command as this user, in the user's groups [default: the same as now]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,

    /// Have the sockets polled for so long, where the ports have the key busy_poll
    #[arg(long, value_name = "MICROSECONDS")]
    busy_poll: Option<String>,

    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
struct BenchArgs {
    #[command(subcommand)]
    what: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Send frames to a network back-end that sends every one back (link=echo)
    #[command(after_help = BENCH_EXAMPLES)]
    Net(Box<BenchNetArgs>),
    /// Send requests to a disk's back-end, with fio's words; writing loads overwrite what is there
    #[command(after_help = BENCH_BLK_EXAMPLES)]
    Blk(Box<BenchBlkArgs>),
}

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
struct BenchNetArgs {
    /// The back-end's socket; several for as many devices, which take turns
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,

    /// The port at the other end of a wire or switch: its frames are sent back from there
    #[arg(long, value_name = "PATH")]
    far: Option<PathBuf>,

    /// Length of the frames: 60..=9000 bytes, or mix (7 x 64, 4 x 590, 1 x 1518) [default: 64]
    #[arg(long, value_name = "BYTES")]
    size: Option<String>,

    /// Queue pairs, 1..=128 [default: 1]
    #[arg(long, value_name = "N")]
    queues: Option<String>,

    /// Format of the rings: split or packed [default: split]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,

    /// Negotiate VIRTIO_F_IN_ORDER
    #[arg(long)]
    in_order: bool,

    /// Negotiate VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    mergeable: bool,

    /// Negotiate VIRTIO_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,

    /// Descriptors of a ring, a power of two [default: 1024]
    #[arg(long, value_name = "N")]
    ring_size: Option<String>,

    /// Frames in flight per queue at most, for flood [default: the ring's size]
    #[arg(long, value_name = "N")]
    in_flight: Option<String>,

    /// What to measure: flood (frames per second), pingpong (one frame at a time) or send (frames
    /// per second that the back-end takes, whether they come back or not) [default: flood]
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,

    /// Send TCP segments of up to 65535 bytes, which the back-end has to cut; with --mode send
    #[arg(long)]
    tso: bool,

    /// How long to measure: 5s, 300ms [default: 5s]
    #[arg(long, value_name = "TIME")]
    duration: Option<String>,

    /// Core to run on [default: the first that is online]
    #[arg(long, value_name = "N")]
    core: Option<String>,

    /// The back-end's process: count its CPU time too
    #[arg(long, value_name = "PID")]
    pid: Option<String>,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

impl BenchNetArgs {
    fn given(self) -> BenchNetGiven {
        BenchNetGiven {
            sockets: self.sockets,
            far: self.far,
            size: self.size,
            queues: self.queues,
            format: self.format,
            in_order: self.in_order,
            mergeable: self.mergeable,
            event_idx: self.event_idx,
            ring_size: self.ring_size,
            in_flight: self.in_flight,
            mode: self.mode,
            tso: self.tso,
            duration: self.duration,
            core: self.core,
            pid: self.pid,
            json: self.json,
        }
    }
}

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
struct BenchBlkArgs {
    /// The back-end's socket
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// read, write, rw, trim, or randread, randwrite, randrw, randtrim [default: read]
    #[arg(long, value_name = "LOAD")]
    rw: Option<String>,

    /// Share of reads in rw and randrw [default: 50]
    #[arg(long, value_name = "PERCENT")]
    rwmixread: Option<String>,

    /// Bytes of a request: 512, 4k, 1m [default: 4k]
    #[arg(long, value_name = "SIZE")]
    bs: Option<String>,

    /// Requests in flight per queue [default: 1]
    #[arg(long, value_name = "N")]
    iodepth: Option<String>,

    /// Request queues, 1..=128 [default: 1]
    #[arg(long, value_name = "N")]
    queues: Option<String>,

    /// Polling threads, which share the queues [default: one per queue]
    #[arg(long, value_name = "N")]
    threads: Option<String>,

    /// Format of the rings: split or packed [default: split]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,

    /// Descriptors of a request: direct (three in the ring) or indirect [default: direct]
    #[arg(long, value_name = "KIND")]
    chains: Option<String>,

    /// Negotiate VIRTIO_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,

    /// Descriptors of a ring, a power of two [default: 128, or more for the depth]
    #[arg(long, value_name = "N")]
    ring_size: Option<String>,

    /// How long to measure: 5s, 300ms [default: 5s]
    #[arg(long, value_name = "TIME")]
    runtime: Option<String>,

    /// Measure as many requests as the range has blocks, N times, instead of a time
    #[arg(long, value_name = "N")]
    loops: Option<String>,

    /// Load before it is measured [default: a tenth of the runtime, 250ms at most]
    #[arg(long, alias = "ramp_time", value_name = "TIME")]
    ramp_time: Option<String>,

    /// Bytes of the disk to use, from --offset on [default: all]
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,

    /// Where on the disk to begin [default: 0]
    #[arg(long, value_name = "SIZE")]
    offset: Option<String>,

    /// Flush after N writes of a queue
    #[arg(long, value_name = "N")]
    fsync: Option<String>,

    /// Stamp blocks that are written, read them back, and check blocks that are read
    #[arg(long, value_name = "crc32c", num_args = 0..=1, require_equals = true,
          default_missing_value = "crc32c")]
    verify: Option<String>,

    /// Seed of random offsets and of stamps; stamps that are read have to have it, if given
    #[arg(long, alias = "randseed", value_name = "N")]
    seed: Option<String>,

    /// Cores to pin the threads to, in turn: 0, 0-3,8 [default: not pinned]
    #[arg(long, alias = "cpus_allowed", value_name = "LIST")]
    cpus_allowed: Option<String>,

    /// The back-end's process: count its CPU time too
    #[arg(long, value_name = "PID")]
    pid: Option<String>,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

impl BenchBlkArgs {
    fn given(self) -> BenchBlkGiven {
        BenchBlkGiven {
            socket: self.socket,
            rw: self.rw,
            rwmixread: self.rwmixread,
            bs: self.bs,
            iodepth: self.iodepth,
            queues: self.queues,
            threads: self.threads,
            format: self.format,
            chains: self.chains,
            event_idx: self.event_idx,
            ring_size: self.ring_size,
            runtime: self.runtime,
            loops: self.loops,
            ramp_time: self.ramp_time,
            size: self.size,
            offset: self.offset,
            fsync: self.fsync,
            verify: self.verify,
            seed: self.seed,
            cpus_allowed: self.cpus_allowed,
            pid: self.pid,
            json: self.json,
        }
    }
}

impl ValueEnum for Level {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse_line(line: &str) -> Result<Invocation, CliError> {
        parse(line.split_whitespace())
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_passes_its_values_on_as_text() {
        let line = "vringd run --core 1,2 --idle spin --placement auto --stop-timeout 3s \
                    --net a=1 --blk b=2 --group g=3 --switch s=4 \
                    --net c=3 --config f.toml --log-level debug";
        let given = Given {
            file: Some(PathBuf::from("f.toml")),
            cores: Some("1,2".to_owned()),
            idle: Some("spin".to_owned()),
            placement: Some("auto".to_owned()),
            stop_timeout: Some("3s".to_owned()),
            nets: vec!["a=1".to_owned(), "c=3".to_owned()],
            blks: vec!["b=2".to_owned()],
            groups: vec!["g=3".to_owned()],
            switches: vec!["s=4".to_owned()],
        };
        let expected = Invocation {
            log_level: Level::Debug,
            action: Action::Run(given),
        };
        assert_eq!(parse_line(line).unwrap(), expected);
    }

    #[test]
    fn check_takes_a_file_and_the_level_is_info() {
        let given = Given {
            file: Some(PathBuf::from("f.toml")),
            ..Given::default()
        };
        let expected = Invocation {
            log_level: Level::Info,
            action: Action::Check(given),
        };
        assert_eq!(
            parse_line("vringd check --config f.toml").unwrap(),
            expected
        );
    }

    #[test]
    fn what_follows_the_dashes_is_the_helpers_command() {
        let line = "vringd xdp-helper --link a --user u --busy-poll 9 --link b -- run --link c";
        let given = HelperGiven {
            links: vec!["a".to_owned(), "b".to_owned()],
            user: Some("u".to_owned()),
            busy_poll: Some("9".to_owned()),
            command: ["run", "--link", "c"].map(OsString::from).to_vec(),
        };
        assert_eq!(parse_line(line).unwrap().action, Action::XdpHelper(given));
        let example = HELPER_EXAMPLES.replace("\\\n", " ");
        let line = example.lines().find(|line| line.contains("xdp-helper"));
        parse_line(line.unwrap().trim()).unwrap();
    }

    #[test]
    fn bench_net_passes_its_values_on_as_text() {
        let line = "vringd bench net --socket /s --socket /t --far /f --size mix --queues 2 \
                    --format packed --in-order --mergeable --event-idx --ring-size 256 \
                    --in-flight 9 \
                    --mode send --tso --duration 1s --core 3 --pid 7 --json";
        let some = |text: &str| Some(text.to_owned());
        let given = BenchNetGiven {
            sockets: vec![PathBuf::from("/s"), PathBuf::from("/t")],
            far: Some(PathBuf::from("/f")),
            size: some("mix"),
            queues: some("2"),
            format: some("packed"),
            in_order: true,
            mergeable: true,
            event_idx: true,
            ring_size: some("256"),
            in_flight: some("9"),
            mode: some("send"),
            tso: true,
            duration: some("1s"),
            core: some("3"),
            pid: some("7"),
            json: true,
        };
        assert_eq!(parse_line(line).unwrap().action, Action::BenchNet(given));
    }

    #[test]
    fn bench_blk_passes_its_values_on_as_text() {
        let line = "vringd bench blk --socket /s --rw randrw --rwmixread 70 --bs 4k --iodepth 32 \
                    --queues 2 --threads 1 --format packed --chains indirect --event-idx \
                    --ring-size 256 --runtime 5 --loops 3 --ramp-time 1s --size 1G --offset 4k \
                    --fsync 8 --verify --seed 9 --cpus-allowed 0,2 --pid 7 --json";
        let some = |text: &str| Some(text.to_owned());
        let given = BenchBlkGiven {
            socket: PathBuf::from("/s"),
            rw: some("randrw"),
            rwmixread: some("70"),
            bs: some("4k"),
            iodepth: some("32"),
            queues: some("2"),
            threads: some("1"),
            format: some("packed"),
            chains: some("indirect"),
            event_idx: true,
            ring_size: some("256"),
            runtime: some("5"),
            loops: some("3"),
            ramp_time: some("1s"),
            size: some("1G"),
            offset: some("4k"),
            fsync: some("8"),
            verify: some("crc32c"),
            seed: some("9"),
            cpus_allowed: some("0,2"),
            pid: some("7"),
            json: true,
        };
        assert_eq!(
            parse_line(line).unwrap().action,
            Action::BenchBlk(Box::new(given))
        );
        let fio = "vringd bench blk --socket /s --verify=md5 --cpus_allowed=0 --ramp_time=1 \
                   --randseed=4";
        let Action::BenchBlk(given) = parse_line(fio).unwrap().action else {
            panic!("another action");
        };
        assert_eq!((given.verify, given.seed), (some("md5"), some("4")));
        assert_eq!(
            (given.cpus_allowed, given.ramp_time),
            (some("0"), some("1"))
        );
    }

    #[test]
    fn wrong_usage_names_the_culprit_with_status_2() {
        for (line, culprit) in [
            ("vringd", "Usage"),
            ("vringd fly", "fly"),
            ("vringd run --cores 1", "--cores"),
            ("vringd run extra", "extra"),
            ("vringd run --core 1 --core 2", "--core"),
            ("vringd run --net", "--net"),
            ("vringd check", "--config"),
            ("vringd bench", "net"),
            ("vringd xdp-helper --user u -- a", "--link"),
            ("vringd xdp-helper --link xdp:e:fd=5", "COMMAND"),
            ("vringd bench net", "--socket"),
            ("vringd bench net --socket /s --queue 1", "--queue"),
            ("vringd run --log-level loud", "loud"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert_eq!(error.exit_status(), 2, "{line}");
            assert!(error.to_string().contains(culprit), "{line}: {error}");
        }
    }

    #[test]
    fn help_and_version_are_no_failure() {
        for line in [
            "vringd --help",
            "vringd run --help",
            "vringd check -h",
            "vringd bench net --help",
            "vringd xdp-helper --help",
            "vringd bench blk --help",
            "vringd --version",
        ] {
            assert_eq!(parse_line(line).unwrap_err().exit_status(), 0, "{line}");
        }
        let version = parse_line("vringd --version").unwrap_err().to_string();
        assert_eq!(version, format!("vringd {}\n", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn help_has_two_examples_that_parse() {
        for line in ["vringd --help", "vringd run --help"] {
            let help = parse_line(line).unwrap_err().to_string();
            assert!(help.contains(EXAMPLES), "{help}");
        }
        let joined = EXAMPLES.replace("\\\n", " ");
        let examples: Vec<&str> = joined
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("vringd "))
            .collect();
        assert_eq!(examples.len(), 3);
        for example in examples {
            parse_line(example).unwrap();
        }
    }
}
