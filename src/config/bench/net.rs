//! The settings of `vringd bench net`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::error::{ConfigError, Problem};
use super::super::size::parse_digits;
use super::{
    Chains, chains, duration, flag, online, packed, pid, queues, refused, ring_size, small,
};

/// Bytes of the longest frame that is to be sent as it is.
const PLAIN_MAX: u16 = 9000;

/// What `bench net` was given, before it is understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BenchNetGiven {
    /// The back-end's sockets, one for each device.
    pub sockets: Vec<PathBuf>,
    /// The socket of the port that frames come out of, if it is another.
    pub far: Option<PathBuf>,
    /// `--size`.
    pub size: Option<String>,
    /// `--queues`.
    pub queues: Option<String>,
    /// `--format`.
    pub format: Option<String>,
    /// `--chains`.
    pub chains: Option<String>,
    /// `--in-order`.
    pub in_order: bool,
    /// `--mergeable`.
    pub mergeable: bool,
    /// `--event-idx`.
    pub event_idx: bool,
    /// `--ring-size`.
    pub ring_size: Option<String>,
    /// `--in-flight`.
    pub in_flight: Option<String>,
    /// `--mode`.
    pub mode: Option<String>,
    /// `--tso`.
    pub tso: bool,
    /// `--duration`.
    pub duration: Option<String>,
    /// `--core`.
    pub core: Option<String>,
    /// `--pid`.
    pub pid: Option<String>,
    /// `--json`.
    pub json: bool,
}

/// What `bench net` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchNetConfig {
    /// The back-end's sockets, one for each device.
    pub sockets: Vec<PathBuf>,
    /// The socket of the port that frames come out of, if it is another.
    pub far: Option<PathBuf>,
    /// Length of the frames.
    pub size: FrameSize,
    /// Queue pairs, 1..=128.
    pub queues: u16,
    /// Packed rings, not split ones.
    pub packed: bool,
    /// How the descriptors of a frame are passed.
    pub chains: Chains,
    /// Negotiate VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Negotiate VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// Negotiate VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Descriptors of each ring, 2..=32768: a power of two, unless they are packed.
    pub ring_size: u16,
    /// Frames in flight per queue at most, 1..=`ring_size`.
    pub in_flight: u16,
    /// What is measured.
    pub mode: BenchMode,
    /// Frames are TCP segments whose checksum, and cutting to 1500 bytes, is left to the back-end.
    pub tso: bool,
    /// How long it is measured, more than zero.
    pub duration: Duration,
    /// The core to run on.
    pub core: usize,
    /// The back-end's process, whose CPU time is counted.
    pub pid: Option<u32>,
    /// Print one JSON object instead of a table.
    pub json: bool,
}

/// Length of frames in bytes, without virtio-net header and checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameSize {
    /// All the same, 60..=9000, or with segmentation left to the back-end 65535.
    Fixed(u16),
    /// 7 of 64, 4 of 590 and 1 of 1518, in rotation.
    Mix,
}

/// What `bench net` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchMode {
    /// Frames per second, with as many in flight as allowed.
    Flood,
    /// The time that one frame takes there and back, one at a time.
    PingPong,
    /// Frames per second that the back-end takes; none is awaited.
    Send,
}

/// Understands and checks everything that was given; `online_cores` are those of this machine.
///
/// # Errors
/// [`ConfigError::Flag`] for the first flag that is refused.
pub fn load_bench_net(
    given: &BenchNetGiven,
    online_cores: &[usize],
) -> Result<BenchNetConfig, ConfigError> {
    let mode = flag("--mode", given.mode.as_ref(), mode)?.unwrap_or(BenchMode::Flood);
    let packed = flag("--format", given.format.as_ref(), packed)?.unwrap_or(false);
    let ring_size = flag("--ring-size", given.ring_size.as_ref(), |text| {
        ring_size(text, packed)
    })?;
    let ring_size = ring_size.unwrap_or(1024);
    let most = u64::from(ring_size);
    let in_flight = flag("--in-flight", given.in_flight.as_ref(), |text| match mode {
        BenchMode::Flood | BenchMode::Send => small(text, 1, most),
        BenchMode::PingPong => Err(Problem::OnlyWith("--mode flood or send")),
    })?;
    let in_flight = match mode {
        BenchMode::Flood | BenchMode::Send => in_flight.unwrap_or(ring_size),
        BenchMode::PingPong => 1,
    };
    if given.far.is_some() && given.sockets.len() > 1 {
        return Err(several_with_far(&given.sockets[1]));
    }
    let one_way = mode == BenchMode::Send;
    let far = given.far.as_ref().filter(|_| one_way);
    let far = far.map(|path| path.display().to_string());
    only_with("--far", far, "--mode flood or pingpong")?;
    let tso = (given.tso && !one_way).then(String::new);
    only_with("--tso", tso, "--mode send")?;
    let longest = if given.tso { u16::MAX } else { PLAIN_MAX };
    let frame_size = |text: &str| frame_size(text, longest);
    let one_core = |text: &str| core(text, online_cores);
    Ok(BenchNetConfig {
        sockets: given.sockets.clone(),
        far: given.far.clone(),
        size: flag("--size", given.size.as_ref(), frame_size)?.unwrap_or(FrameSize::Fixed(64)),
        queues: flag("--queues", given.queues.as_ref(), queues)?.unwrap_or(1),
        packed,
        chains: flag("--chains", given.chains.as_ref(), chains)?.unwrap_or(Chains::Direct),
        in_order: given.in_order,
        mergeable: given.mergeable,
        event_idx: given.event_idx,
        ring_size,
        in_flight,
        mode,
        tso: given.tso,
        duration: flag("--duration", given.duration.as_ref(), duration)?
            .unwrap_or(Duration::from_secs(5)),
        core: flag("--core", given.core.as_ref(), one_core)?
            .or(online_cores.first().copied())
            .unwrap_or(0),
        pid: flag("--pid", given.pid.as_ref(), pid)?,
        json: given.json,
    })
}

fn several_with_far(socket: &Path) -> ConfigError {
    ConfigError::Flag {
        flag: "--socket",
        value: socket.display().to_string(),
        problem: Box::new(Problem::Expected("one socket with --far".to_owned())),
    }
}

/// Refuses a flag that is `useless` without another.
fn only_with(
    flag: &'static str,
    useless: Option<String>,
    other: &'static str,
) -> Result<(), ConfigError> {
    match useless {
        Some(value) => Err(refused(flag, &value, Problem::OnlyWith(other))),
        None => Ok(()),
    }
}

fn frame_size(text: &str, longest: u16) -> Result<FrameSize, Problem> {
    if text == "mix" {
        return match longest {
            PLAIN_MAX => Ok(FrameSize::Mix),
            _ => Err(Problem::Expected("bytes, with --tso".to_owned())),
        };
    }
    if !text.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(Problem::Expected("bytes, or mix".to_owned()));
    }
    small(text, 60, longest.into()).map(FrameSize::Fixed)
}

fn mode(text: &str) -> Result<BenchMode, Problem> {
    match text {
        "flood" => Ok(BenchMode::Flood),
        "pingpong" => Ok(BenchMode::PingPong),
        "send" => Ok(BenchMode::Send),
        _ => Err(Problem::UnknownKind {
            what: "mode",
            given: text.to_owned(),
            known: "flood, pingpong, send",
        }),
    }
}

fn core(text: &str, cores: &[usize]) -> Result<usize, Problem> {
    online(parse_digits(text, "the number of a core")?, cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(change: impl FnOnce(&mut BenchNetGiven)) -> Result<BenchNetConfig, ConfigError> {
        let mut given = BenchNetGiven::default();
        change(&mut given);
        load_bench_net(&given, &[2, 3])
    }

    #[test]
    fn what_is_not_given_has_its_default() {
        let config = load(|_| ()).unwrap();
        assert_eq!(config.size, FrameSize::Fixed(64));
        assert_eq!((config.queues, config.packed), (1, false));
        assert_eq!(config.chains, Chains::Direct);
        assert_eq!((config.ring_size, config.in_flight), (1024, 1024));
        assert_eq!(config.mode, BenchMode::Flood);
        assert_eq!(config.duration, Duration::from_secs(5));
        assert_eq!((config.core, config.pid), (2, None));
    }

    #[test]
    fn values_are_understood() {
        let some = |text: &str| Some(text.to_owned());
        let config = load(|given| {
            given.size = some("mix");
            given.queues = some("2");
            given.format = some("packed");
            given.chains = some("indirect");
            given.ring_size = some("255");
            given.in_flight = some("100");
            given.duration = some("300ms");
            given.core = some("3");
            given.pid = Some(std::process::id().to_string());
        });
        let config = config.unwrap();
        assert_eq!(config.size, FrameSize::Mix);
        assert_eq!((config.queues, config.packed), (2, true));
        assert_eq!(config.chains, Chains::Indirect);
        assert_eq!((config.ring_size, config.in_flight), (255, 100));
        assert_eq!(config.duration, Duration::from_millis(300));
        assert_eq!((config.core, config.pid), (3, Some(std::process::id())));
        let config = load(|given| given.mode = some("pingpong")).unwrap();
        assert_eq!((config.mode, config.in_flight), (BenchMode::PingPong, 1));
        let config = load(|given| given.ring_size = some("64")).unwrap();
        assert_eq!(config.in_flight, 64);
        let config = load(|given| {
            given.mode = some("send");
            given.tso = true;
            given.size = some("65535");
        });
        let config = config.unwrap();
        assert_eq!((config.mode, config.in_flight), (BenchMode::Send, 1024));
        assert_eq!((config.tso, config.size), (true, FrameSize::Fixed(65535)));
    }

    #[test]
    fn a_refused_value_is_named_with_its_flag() {
        type Set = fn(&mut BenchNetGiven, String);
        let cases: &[(&str, Set, &[&str])] = &[
            (
                "--size",
                |g, v| g.size = Some(v),
                &["59", "9001", "big", ""],
            ),
            ("--queues", |g, v| g.queues = Some(v), &["0", "129", "-1"]),
            ("--format", |g, v| g.format = Some(v), &["Split", "both"]),
            ("--chains", |g, v| g.chains = Some(v), &["Direct", ""]),
            (
                "--ring-size",
                |g, v| {
                    g.format = Some("packed".to_owned());
                    g.ring_size = Some(v);
                },
                &["0", "1", "32769"],
            ),
            (
                "--ring-size",
                |g, v| g.ring_size = Some(v),
                &["0", "1", "1000", "65536"],
            ),
            ("--in-flight", |g, v| g.in_flight = Some(v), &["0", "1025"]),
            ("--mode", |g, v| g.mode = Some(v), &["ping"]),
            ("--duration", |g, v| g.duration = Some(v), &["0", "5m"]),
            ("--core", |g, v| g.core = Some(v), &["1", "2,3"]),
            ("--pid", |g, v| g.pid = Some(v), &["x", "4294967295"]),
        ];
        for (flag, set, values) in cases {
            for value in *values {
                let error = load(|given| set(given, (*value).to_owned())).unwrap_err();
                let message = error.to_string();
                assert!(
                    message.starts_with(&format!("{flag} {value:?}: ")),
                    "{message}"
                );
            }
        }
        let error = load(|given| {
            given.sockets = vec!["/a".into(), "/b".into()];
            given.far = Some("/f".into());
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "--socket \"/b\": expected one socket with --far"
        );
        let error = load(|given| {
            given.mode = Some("pingpong".to_owned());
            given.in_flight = Some("7".to_owned());
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "--in-flight \"7\": only has a meaning with --mode flood or send"
        );
        assert_eq!(
            load(|given| given.tso = true).unwrap_err().to_string(),
            "--tso \"\": only has a meaning with --mode send"
        );
        let error = load(|given| {
            given.mode = Some("send".to_owned());
            given.far = Some("/tmp/far.sock".into());
        });
        assert_eq!(
            error.unwrap_err().to_string(),
            "--far \"/tmp/far.sock\": only has a meaning with --mode flood or pingpong"
        );
    }
}
