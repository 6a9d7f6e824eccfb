//! What a measurement found, as a table or as JSON.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::super::Histogram;
use super::super::histogram::PERCENTILES;
use super::Kind;
use super::run::Backend;
use super::worker::Outcome;
use crate::config::{BenchBlkConfig, Chains, RwKind};

/// What a measurement found.
#[derive(Debug)]
pub struct Report {
    pub(super) config: BenchBlkConfig,
    pub(super) disk: Disk,
    pub(super) ring_size: u16,
    /// The shared memory is in pages of 2 MiB.
    pub(super) huge_pages: bool,
    /// Of random numbers and of stamps.
    pub(super) seed: u64,
    /// The longest time that a thread measured.
    pub(super) elapsed: Option<Duration>,
    pub(super) nanos_per_tick: f64,
    pub(super) backend: Option<Backend>,
    /// Of all threads.
    pub(super) outcomes: Vec<Outcome>,
}

/// The disk as its config space says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    /// Capacity.
    pub bytes: u64,
    /// Logical block size.
    pub block_bytes: u32,
}

/// What the requests of one kind came to.
struct Share {
    requests: u64,
    iops: f64,
    latency: Histogram,
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates and times, shown with a few digits"
)]
impl Report {
    /// Requests per second, of all kinds but FLUSH.
    #[must_use]
    pub fn iops(&self) -> f64 {
        let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Flush);
        kinds.map(|kind| self.share(kind).iops).sum()
    }

    /// 10^6 bytes per second.
    #[must_use]
    pub fn mb_per_s(&self) -> f64 {
        self.mb(self.iops())
    }

    fn mb(&self, iops: f64) -> f64 {
        iops * f64::from(self.config.block_bytes) / 1e6
    }

    /// CPU time of the back-end per request, in nanoseconds.
    #[must_use]
    pub fn backend_ns_per_request(&self) -> Option<f64> {
        let backend = self.backend.filter(|backend| backend.requests > 0)?;
        Some(backend.cpu as f64 / backend.requests as f64)
    }

    fn share(&self, kind: Kind) -> Share {
        let mut share = Share {
            requests: 0,
            iops: 0.0,
            latency: Histogram::default(),
        };
        for outcome in &self.outcomes {
            let requests = outcome.tally.done[kind as usize];
            share.requests += requests;
            share.iops += requests as f64 / outcome.elapsed.as_secs_f64();
            share.latency.merge(&outcome.tally.latency[kind as usize]);
        }
        share
    }

    /// Ticks in nanoseconds.
    fn nanos(&self, ticks: u64) -> u64 {
        (ticks as f64 * self.nanos_per_tick).round() as u64
    }

    fn requests(&self) -> u64 {
        Kind::ALL.map(|kind| self.share(kind).requests).iter().sum()
    }

    fn kicks(&self) -> u64 {
        self.outcomes.iter().map(|it| it.tally.kicks).sum()
    }

    /// Blocks that were checked; none unless verification was asked for.
    fn verified(&self) -> Option<u64> {
        let sum = self.outcomes.iter().map(|it| it.checked).sum();
        self.config.verify.then_some(sum)
    }

    fn share_json(&self, kind: Kind) -> Value {
        let share = self.share(kind);
        let mut latency = Map::new();
        latency.insert("samples".to_owned(), share.latency.samples().into());
        for (key, _, per_mille) in PERCENTILES {
            let ticks = share.latency.percentile(per_mille);
            latency.insert(key.to_owned(), self.nanos(ticks).into());
        }
        let max = self.nanos(share.latency.max());
        latency.insert("max".to_owned(), max.into());
        let moved = matches!(kind, Kind::Read | Kind::Write);
        json!({
            "requests": share.requests,
            "iops": share.iops,
            "mb_per_s": moved.then(|| self.mb(share.iops)),
            "latency_ns": latency,
        })
    }

    /// Everything, in one object. Kinds of requests that did not occur are null.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut object = json!({
            "socket": self.config.socket.display().to_string(),
            "rw": self.config.rw.name(),
            "bs": self.config.block_bytes,
            "iodepth": self.config.io_depth,
            "queues": self.config.queues,
            "threads": self.config.threads,
            "format": self.format(),
            "chains": self.chains(),
            "rewrite": self.config.rewrite,
            "event_idx": self.config.event_idx,
            "ring_size": self.ring_size,
            "cpus_allowed": self.config.cores,
            "huge_pages": self.huge_pages,
            "offset": self.config.offset,
            "size": self.config.size,
            "disk_bytes": self.disk.bytes,
            "disk_block_bytes": self.disk.block_bytes,
            "seed": self.seed,
            "seconds": self.elapsed.unwrap_or_default().as_secs_f64(),
            "requests": self.requests(),
            "iops": self.iops(),
            "mb_per_s": self.mb_per_s(),
            "kicks": self.kicks(),
            "verified": self.verified(),
            "backend_cpu_ns": self.backend.map(|backend| backend.cpu),
            "backend_cpu_ns_per_request": self.backend_ns_per_request(),
        });
        if let Value::Object(object) = &mut object {
            for kind in Kind::ALL {
                let any = self.share(kind).requests > 0;
                let share = if any {
                    self.share_json(kind)
                } else {
                    Value::Null
                };
                object.insert(kind.name().to_owned(), share);
            }
        }
        object
    }

    fn format(&self) -> &'static str {
        if self.config.packed {
            "packed"
        } else {
            "split"
        }
    }

    fn chains(&self) -> &'static str {
        match self.config.chains {
            Chains::Direct => "direct",
            Chains::Indirect => "indirect",
        }
    }

    fn write_share(&self, f: &mut fmt::Formatter<'_>, kind: Kind) -> fmt::Result {
        let share = self.share(kind);
        if share.requests == 0 {
            return Ok(());
        }
        write!(f, "\n{:<9} {:.0} IOPS", kind.name(), share.iops)?;
        if matches!(kind, Kind::Read | Kind::Write) {
            write!(f, ", {:.1} MB/s", self.mb(share.iops))?;
        }
        write!(f, "\nlatency  ")?;
        for (_, name, per_mille) in PERCENTILES {
            let ticks = share.latency.percentile(per_mille);
            write!(f, " {name} {},", self.nanos(ticks))?;
        }
        let max = self.nanos(share.latency.max());
        write!(f, " max {max} ns ({} requests)", share.requests)
    }
}

impl fmt::Display for Report {
    /// The table, without a line end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        write!(f, "load      {}", config.rw.name())?;
        if config.rw.kind == RwKind::Mixed {
            write!(f, " ({} % reads)", config.read_percent)?;
        }
        writeln!(
            f,
            ", {} B, {} in flight per queue, {:.1} s",
            config.block_bytes,
            config.io_depth,
            self.elapsed.unwrap_or_default().as_secs_f64()
        )?;
        writeln!(
            f,
            "queues    {} by {} threads, {} rings of {}, {} chains{}{}, {} pages",
            config.queues,
            config.threads,
            self.format(),
            self.ring_size,
            self.chains(),
            if config.rewrite { " written anew" } else { "" },
            if config.event_idx { ", event-idx" } else { "" },
            if self.huge_pages { "2 MiB" } else { "small" },
        )?;
        write!(
            f,
            "disk      {} bytes in blocks of {}, {} kicks",
            self.disk.bytes,
            self.disk.block_bytes,
            self.kicks()
        )?;
        for kind in Kind::ALL {
            self.write_share(f, kind)?;
        }
        if config.rw.kind == RwKind::Mixed {
            let (iops, mb) = (self.iops(), self.mb_per_s());
            write!(f, "\nall       {iops:.0} IOPS, {mb:.1} MB/s")?;
        }
        if let Some(verified) = self.verified() {
            let seed = self.seed;
            write!(
                f,
                "\nverified  {verified} blocks read and right, seed {seed}"
            )?;
        }
        if let (Some(backend), Some(per_request)) = (self.backend, self.backend_ns_per_request()) {
            let percent = backend.cpu as f64 / backend.elapsed.as_nanos() as f64 * 100.0;
            write!(
                f,
                "\nback-end  {per_request:.1} ns of CPU time per request, {percent:.0} % of a core"
            )?;
        }
        Ok(())
    }
}
