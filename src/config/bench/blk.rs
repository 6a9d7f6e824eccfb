//! The settings of `vringd bench blk`; where fio has a word for one, it is fio's.

use std::path::PathBuf;
use std::time::Duration;

use super::super::error::{ConfigError, Problem};
use super::super::size::{parse_digits, parse_duration, parse_size};
use super::{
    Chains, chains, duration, flag, online, packed, pid, queues, refused, ring_size, small,
};
use crate::sys::cpu::parse_core_list;

/// What `bench blk` was given, before it is understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BenchBlkGiven {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// `--rw`.
    pub rw: Option<String>,
    /// `--rwmixread`.
    pub rwmixread: Option<String>,
    /// `--bs`.
    pub bs: Option<String>,
    /// `--iodepth`.
    pub iodepth: Option<String>,
    /// `--queues`.
    pub queues: Option<String>,
    /// `--threads`.
    pub threads: Option<String>,
    /// `--format`.
    pub format: Option<String>,
    /// `--chains`.
    pub chains: Option<String>,
    /// `--rewrite`.
    pub rewrite: bool,
    /// `--event-idx`.
    pub event_idx: bool,
    /// `--ring-size`.
    pub ring_size: Option<String>,
    /// `--runtime`.
    pub runtime: Option<String>,
    /// `--loops`.
    pub loops: Option<String>,
    /// `--ramp-time`.
    pub ramp_time: Option<String>,
    /// `--size`.
    pub size: Option<String>,
    /// `--offset`.
    pub offset: Option<String>,
    /// `--fsync`.
    pub fsync: Option<String>,
    /// `--verify`.
    pub verify: Option<String>,
    /// `--seed`.
    pub seed: Option<String>,
    /// `--cpus-allowed`.
    pub cpus_allowed: Option<String>,
    /// `--pid`.
    pub pid: Option<String>,
    /// `--json`.
    pub json: bool,
}

/// What `bench blk` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchBlkConfig {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// What is done.
    pub rw: Rw,
    /// Of a hundred requests of a mixed load, so many read.
    pub read_percent: u8,
    /// Bytes of a request, a multiple of 512.
    pub block_bytes: u32,
    /// Requests in flight per queue.
    pub io_depth: u16,
    /// Request queues, 1..=128.
    pub queues: u16,
    /// Polling threads, 1..=`queues`.
    pub threads: u16,
    /// Packed rings, not split ones.
    pub packed: bool,
    /// How the descriptors of a request are passed.
    pub chains: Chains,
    /// Write the descriptors of each request anew.
    pub rewrite: bool,
    /// Negotiate VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Descriptors of each ring: a power of two.
    pub ring_size: Option<u16>,
    /// How long it is measured.
    pub span: Span,
    /// How long it is not measured before; by default a tenth, 250 ms at most.
    pub ramp: Option<Duration>,
    /// Where on the disk the range begins, a multiple of `block_bytes`.
    pub offset: u64,
    /// Bytes of the range, a multiple of `block_bytes`; without it the rest of the disk.
    pub size: Option<u64>,
    /// FLUSH after so many writes of a queue.
    pub fsync: Option<u32>,
    /// Stamp what is written, check what is read.
    pub verify: bool,
    /// Of random numbers and of stamps.
    pub seed: Option<u64>,
    /// The cores of the threads, in turn; without any they are not pinned.
    pub cores: Vec<usize>,
    /// The back-end's process, whose CPU time is counted.
    pub pid: Option<u32>,
    /// Print one JSON object instead of a table.
    pub json: bool,
}

/// What requests do, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rw {
    /// Which of them.
    pub kind: RwKind,
    /// Anywhere in the range, not one after the other.
    pub random: bool,
}

/// What requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RwKind {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Read or write.
    Mixed,
    /// Discard.
    Trim,
}

/// fio's names.
const RWS: [(&str, Rw); 9] = {
    const fn rw(kind: RwKind, random: bool) -> Rw {
        Rw { kind, random }
    }
    [
        ("read", rw(RwKind::Read, false)),
        ("write", rw(RwKind::Write, false)),
        ("randread", rw(RwKind::Read, true)),
        ("randwrite", rw(RwKind::Write, true)),
        ("rw", rw(RwKind::Mixed, false)),
        ("randrw", rw(RwKind::Mixed, true)),
        ("trim", rw(RwKind::Trim, false)),
        ("randtrim", rw(RwKind::Trim, true)),
        ("readwrite", rw(RwKind::Mixed, false)),
    ]
};

impl Rw {
    /// fio's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        RWS.iter().find(|(_, rw)| *rw == self).map_or("", |it| it.0)
    }
}

/// How long it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// A time.
    Runtime(Duration),
    /// As many requests as the range has blocks, so many times.
    Loops(u32),
}

const DEPTH_MAX: u64 = 8192;
const BLOCK_MAX: u64 = 64 << 20;
const SECTOR: u32 = 512;

/// Understands and checks everything that was given; `online_cores` are those of this machine.
///
/// # Errors
/// [`ConfigError::Flag`] for the first flag that is refused.
pub fn load_bench_blk(
    given: &BenchBlkGiven,
    online_cores: &[usize],
) -> Result<BenchBlkConfig, ConfigError> {
    let rw = flag("--rw", given.rw.as_ref(), rw)?.unwrap_or(RWS[0].1);
    let block_bytes = flag("--bs", given.bs.as_ref(), block_bytes)?.unwrap_or(4096);
    let queues = flag("--queues", given.queues.as_ref(), queues)?.unwrap_or(1);
    let blocks = |text: &str| multiple(parse_size(text)?, block_bytes);
    let cores = |text: &str| cores(text, online_cores);
    let span = span(given)?;
    Ok(BenchBlkConfig {
        socket: given.socket.clone(),
        rw,
        read_percent: flag("--rwmixread", given.rwmixread.as_ref(), |text| {
            percent(text, rw)
        })?
        .unwrap_or(50),
        block_bytes,
        io_depth: flag("--iodepth", given.iodepth.as_ref(), |text| {
            small(text, 1, DEPTH_MAX)
        })?
        .unwrap_or(1),
        queues,
        threads: flag("--threads", given.threads.as_ref(), |text| {
            small(text, 1, u64::from(queues))
        })?
        .unwrap_or(queues),
        packed: flag("--format", given.format.as_ref(), packed)?.unwrap_or(false),
        chains: flag("--chains", given.chains.as_ref(), chains)?.unwrap_or(Chains::Direct),
        rewrite: given.rewrite,
        event_idx: given.event_idx,
        ring_size: flag("--ring-size", given.ring_size.as_ref(), |text| {
            ring_size(text, false)
        })?,
        span,
        ramp: flag("--ramp-time", given.ramp_time.as_ref(), |text| match span {
            Span::Runtime(_) => parse_duration(text),
            Span::Loops(_) => Err(Problem::OnlyWith("--runtime")),
        })?,
        offset: flag("--offset", given.offset.as_ref(), blocks)?.unwrap_or(0),
        size: flag("--size", given.size.as_ref(), |text| match blocks(text)? {
            0 => Err(Problem::Expected("more than 0 bytes".to_owned())),
            size => Ok(size),
        })?,
        fsync: flag("--fsync", given.fsync.as_ref(), |text| fsync(text, rw))?,
        verify: flag("--verify", given.verify.as_ref(), |text| verify(text, rw))?.is_some(),
        seed: flag("--seed", given.seed.as_ref(), |text| {
            parse_digits(text, "a number")
        })?,
        cores: flag("--cpus-allowed", given.cpus_allowed.as_ref(), cores)?.unwrap_or_default(),
        pid: flag("--pid", given.pid.as_ref(), pid)?,
        json: given.json,
    })
}

fn span(given: &BenchBlkGiven) -> Result<Span, ConfigError> {
    let loops = flag("--loops", given.loops.as_ref(), |text| {
        small(text, 1, u64::from(u16::MAX))
    })?;
    let runtime = flag("--runtime", given.runtime.as_ref(), duration)?;
    match (loops, runtime) {
        (Some(_), Some(_)) => Err(refused(
            "--loops",
            given.loops.as_deref().unwrap_or_default(),
            Problem::Exclusive("--loops", "--runtime"),
        )),
        (Some(loops), None) => Ok(Span::Loops(u32::from(loops))),
        (None, runtime) => Ok(Span::Runtime(runtime.unwrap_or(Duration::from_secs(5)))),
    }
}

fn rw(text: &str) -> Result<Rw, Problem> {
    let found = RWS.iter().find(|(name, _)| *name == text);
    found.map(|(_, rw)| *rw).ok_or(Problem::UnknownKind {
        what: "load",
        given: text.to_owned(),
        known: "read, write, randread, randwrite, rw, randrw, trim, randtrim",
    })
}

fn block_bytes(text: &str) -> Result<u32, Problem> {
    let (min, max) = (u64::from(SECTOR), BLOCK_MAX);
    let bytes = multiple(parse_size(text)?, SECTOR)?;
    match u32::try_from(bytes) {
        Ok(small) if (min..=max).contains(&bytes) => Ok(small),
        _ => Err(Problem::OutOfRange { min, max }),
    }
}

fn multiple(size: u64, block_size: u32) -> Result<u64, Problem> {
    if size.is_multiple_of(u64::from(block_size)) {
        Ok(size)
    } else {
        Err(Problem::NotAMultiple { size, block_size })
    }
}

fn percent(text: &str, rw: Rw) -> Result<u8, Problem> {
    if rw.kind != RwKind::Mixed {
        return Err(Problem::OnlyWith("--rw rw or randrw"));
    }
    let percent = small(text, 0, 100)?;
    u8::try_from(percent).map_err(|_| Problem::TooLarge)
}

fn fsync(text: &str, rw: Rw) -> Result<u32, Problem> {
    if !matches!(rw.kind, RwKind::Write | RwKind::Mixed) {
        return Err(Problem::OnlyWith("a load that writes"));
    }
    let (min, max) = (1, u64::from(u32::MAX));
    match u32::try_from(parse_digits(text, "a number")?) {
        Ok(writes) if writes > 0 => Ok(writes),
        _ => Err(Problem::OutOfRange { min, max }),
    }
}

fn verify(text: &str, rw: Rw) -> Result<(), Problem> {
    if text != "crc32c" {
        return Err(Problem::UnknownKind {
            what: "checksum",
            given: text.to_owned(),
            known: "crc32c",
        });
    }
    if rw.kind == RwKind::Trim {
        return Err(Problem::OnlyWith("a load that reads or writes"));
    }
    Ok(())
}

fn cores(text: &str, online_cores: &[usize]) -> Result<Vec<usize>, Problem> {
    let malformed = |_| Problem::Expected("cores such as 0 or 0-3,8".to_owned());
    let cores = parse_core_list(text).map_err(malformed)?;
    let one = |core: usize| online(core as u64, online_cores);
    cores.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(change: impl FnOnce(&mut BenchBlkGiven)) -> Result<BenchBlkConfig, ConfigError> {
        let mut given = BenchBlkGiven::default();
        change(&mut given);
        load_bench_blk(&given, &[2, 3])
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn what_is_not_given_has_its_default() {
        let config = load(|_| ()).unwrap();
        assert_eq!(config.rw.name(), "read");
        assert_eq!((config.block_bytes, config.io_depth), (4096, 1));
        assert_eq!((config.queues, config.threads), (1, 1));
        assert_eq!((config.packed, config.verify), (false, false));
        assert_eq!(config.span, Span::Runtime(Duration::from_secs(5)));
        assert_eq!((config.offset, config.size, config.seed), (0, None, None));
        assert!(config.cores.is_empty());
    }

    #[test]
    fn values_are_understood() {
        let config = load(|given| {
            given.rw = some("randrw");
            given.rwmixread = some("70");
            given.bs = some("64k");
            given.iodepth = some("32");
            given.queues = some("4");
            given.threads = some("1");
            given.format = some("packed");
            given.chains = some("indirect");
            given.loops = some("2");
            given.offset = some("1M");
            given.size = some("2M");
            given.fsync = some("8");
            given.verify = some("crc32c");
            given.seed = some("7");
            given.cpus_allowed = some("2-3");
        });
        let config = config.unwrap();
        let (kind, random) = (RwKind::Mixed, true);
        assert_eq!(config.rw, Rw { kind, random });
        assert_eq!((config.read_percent, config.block_bytes), (70, 65536));
        assert_eq!((config.io_depth, config.queues), (32, 4));
        assert_eq!((config.threads, config.packed), (1, true));
        assert_eq!(config.chains, Chains::Indirect);
        assert_eq!(config.span, Span::Loops(2));
        assert_eq!((config.offset, config.size), (1 << 20, Some(2 << 20)));
        assert_eq!((config.fsync, config.verify), (Some(8), true));
        assert_eq!((config.seed, config.cores), (Some(7), vec![2, 3]));
        for (name, rw) in RWS {
            let config = load(|given| given.rw = some(name)).unwrap();
            assert_eq!(config.rw, rw);
            assert!(rw.name() == name || name == "readwrite");
        }
    }

    #[test]
    fn a_refused_value_is_named_with_its_flag() {
        type Set = fn(&mut BenchBlkGiven, String);
        let cases: &[(&str, Set, &[&str])] = &[
            ("--rw", |g, v| g.rw = Some(v), &["randreed", ""]),
            ("--rwmixread", |g, v| g.rwmixread = Some(v), &["50"]),
            ("--bs", |g, v| g.bs = Some(v), &["0", "511", "4x", "128M"]),
            ("--iodepth", |g, v| g.iodepth = Some(v), &["0", "8193"]),
            ("--queues", |g, v| g.queues = Some(v), &["0", "129"]),
            ("--threads", |g, v| g.threads = Some(v), &["0", "2"]),
            ("--format", |g, v| g.format = Some(v), &["round"]),
            ("--chains", |g, v| g.chains = Some(v), &["golden"]),
            ("--ring-size", |g, v| g.ring_size = Some(v), &["1000"]),
            ("--runtime", |g, v| g.runtime = Some(v), &["0", "1m"]),
            ("--loops", |g, v| g.loops = Some(v), &["0"]),
            ("--offset", |g, v| g.offset = Some(v), &["1", "6k"]),
            ("--size", |g, v| g.size = Some(v), &["0", "4095"]),
            ("--fsync", |g, v| g.fsync = Some(v), &["1"]),
            ("--verify", |g, v| g.verify = Some(v), &["md5"]),
            ("--seed", |g, v| g.seed = Some(v), &["x"]),
            (
                "--cpus-allowed",
                |g, v| g.cpus_allowed = Some(v),
                &["1", "a"],
            ),
            ("--pid", |g, v| g.pid = Some(v), &["x", "4294967295"]),
        ];
        for (flag, set, values) in cases {
            for value in *values {
                let error = load(|given| set(given, (*value).to_owned())).unwrap_err();
                let message = error.to_string();
                let place = format!("{flag} {value:?}: ");
                assert!(message.starts_with(&place), "{message}");
            }
        }
    }

    #[test]
    fn settings_that_have_no_meaning_together_are_refused() {
        type Set = fn(&mut BenchBlkGiven);
        let cases: [(Set, &str); 3] = [
            (
                |g| (g.loops, g.runtime) = (some("1"), some("1s")),
                "--loops \"1\": --loops and --runtime exclude each other",
            ),
            (
                |g| (g.loops, g.ramp_time) = (some("1"), some("1s")),
                "--ramp-time \"1s\": only has a meaning with --runtime",
            ),
            (
                |g| (g.rw, g.verify) = (some("trim"), some("crc32c")),
                "--verify \"crc32c\": only has a meaning with a load that reads or writes",
            ),
        ];
        for (set, says) in cases {
            assert_eq!(load(set).unwrap_err().to_string(), says);
        }
    }
}
