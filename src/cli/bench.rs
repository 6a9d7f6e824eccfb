//! The flags of `vringd bench net` and `vringd bench blk`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::{BenchBlkGiven, BenchNetGiven};

use super::Action;

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

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: BenchCommand,
}

impl BenchArgs {
    pub(super) fn action(self) -> Action {
        match self.what {
            BenchCommand::Net(net) => Action::BenchNet(net.given()),
            BenchCommand::Blk(blk) => Action::BenchBlk(Box::new(blk.given())),
        }
    }
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

    /// Descriptors of a frame: direct (one in the ring) or indirect (one, and a table of two)
    /// [default: direct]
    #[arg(long, value_name = "KIND")]
    chains: Option<String>,

    /// Negotiate VIRTIO_F_IN_ORDER
    #[arg(long)]
    in_order: bool,

    /// Negotiate VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    mergeable: bool,

    /// Negotiate VIRTIO_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,

    /// Descriptors of a ring, 2..=32768; of a split one a power of two [default: 1024]
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
            chains: self.chains,
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

    /// Write the descriptors of each request anew, as guests' drivers do; else a split ring keeps
    /// them, which none of these does, and costs less
    #[arg(long)]
    rewrite: bool,

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
            rewrite: self.rewrite,
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

#[cfg(test)]
mod tests {
    use super::super::tests::parse_line;
    use super::*;

    #[test]
    fn bench_net_passes_its_values_on_as_text() {
        let line = "vringd bench net --socket /s --socket /t --far /f --size mix --queues 2 \
                    --format packed --chains indirect --in-order --mergeable --event-idx \
                    --ring-size 256 --in-flight 9 \
                    --mode send --tso --duration 1s --core 3 --pid 7 --json";
        let some = |text: &str| Some(text.to_owned());
        let given = BenchNetGiven {
            sockets: vec![PathBuf::from("/s"), PathBuf::from("/t")],
            far: Some(PathBuf::from("/f")),
            size: some("mix"),
            queues: some("2"),
            format: some("packed"),
            chains: some("indirect"),
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
                    --queues 2 --threads 1 --format packed --chains indirect --rewrite \
                    --event-idx --ring-size 256 --runtime 5 --loops 3 --ramp-time 1s --size 1G \
                    --offset 4k --fsync 8 --verify --seed 9 --cpus-allowed 0,2 --pid 7 --json";
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
            rewrite: true,
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
}
