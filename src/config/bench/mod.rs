//! The settings of `vringd bench`, and what its commands understand alike.

use std::path::Path;
use std::time::Duration;

use super::error::{ConfigError, Problem};
use super::size::{parse_digits, parse_duration};

mod blk;
mod net;

pub use blk::{BenchBlkConfig, BenchBlkGiven, Rw, RwKind, Span, load_bench_blk};
pub use net::{BenchMode, BenchNetConfig, BenchNetGiven, FrameSize, load_bench_net};

const QUEUES_MAX: u64 = 128;
const RING_SIZES: &str = "a power of two in 2..=32768";

/// How the descriptors of a request, or of a frame, are passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chains {
    /// In the ring itself.
    Direct,
    /// In a table beside it, which one descriptor points to.
    Indirect,
}

fn flag<T>(
    flag: &'static str,
    value: Option<&String>,
    understand: impl FnOnce(&str) -> Result<T, Problem>,
) -> Result<Option<T>, ConfigError> {
    let Some(value) = value else {
        return Ok(None);
    };
    understand(value)
        .map(Some)
        .map_err(|problem| refused(flag, value, problem))
}

fn refused(flag: &'static str, value: &str, problem: Problem) -> ConfigError {
    ConfigError::Flag {
        flag,
        value: value.to_owned(),
        problem: Box::new(problem),
    }
}

fn small(text: &str, min: u64, max: u64) -> Result<u16, Problem> {
    let number = parse_digits(text, "a number")?;
    match u16::try_from(number) {
        Ok(small) if (min..=max).contains(&number) => Ok(small),
        _ => Err(Problem::OutOfRange { min, max }),
    }
}

fn queues(text: &str) -> Result<u16, Problem> {
    small(text, 1, QUEUES_MAX)
}

/// The size of a split ring, or of `any` ring: packed ones need be no power of two (VIRTIO 1.3
/// §2.8.10.1).
fn ring_size(text: &str, any: bool) -> Result<u16, Problem> {
    let size = small(text, 2, 32768);
    if any {
        return size;
    }
    size.ok()
        .filter(|size| size.is_power_of_two())
        .ok_or_else(|| Problem::Expected(RING_SIZES.to_owned()))
}

fn packed(text: &str) -> Result<bool, Problem> {
    match text {
        "split" => Ok(false),
        "packed" => Ok(true),
        _ => Err(Problem::UnknownKind {
            what: "ring format",
            given: text.to_owned(),
            known: "split, packed",
        }),
    }
}

fn chains(text: &str) -> Result<Chains, Problem> {
    match text {
        "direct" => Ok(Chains::Direct),
        "indirect" => Ok(Chains::Indirect),
        _ => Err(Problem::UnknownKind {
            what: "kind of chains",
            given: text.to_owned(),
            known: "direct, indirect",
        }),
    }
}

fn duration(text: &str) -> Result<Duration, Problem> {
    let duration = parse_duration(text)?;
    if duration.is_zero() {
        return Err(Problem::Expected("more than 0 seconds".to_owned()));
    }
    Ok(duration)
}

/// A core of this machine, of which `online` are there.
fn online(core: u64, online: &[usize]) -> Result<usize, Problem> {
    let found = online.iter().find(|online| **online as u64 == core);
    found.copied().ok_or_else(|| Problem::NoSuchCore {
        core,
        online: online
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(","),
    })
}

fn pid(text: &str) -> Result<u32, Problem> {
    let pid = parse_digits(text, "the number of a process")?;
    let pid = u32::try_from(pid).map_err(|_| Problem::TooLarge)?;
    if !Path::new(&format!("/proc/{pid}/task")).is_dir() {
        return Err(Problem::Path("no such process".to_owned()));
    }
    Ok(pid)
}
