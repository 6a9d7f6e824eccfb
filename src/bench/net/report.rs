//! What a measurement found, as a table or as JSON.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::Histogram;
use super::super::histogram::PERCENTILES;
use crate::config::{BenchMode, BenchNetConfig, Chains, FrameSize};

/// What a measurement found. Rates, bytes and latencies are those of the measured time; `sent`,
/// `received` and `lost` are over everything, with the warm-up before and the frames awaited after.
#[derive(Debug)]
pub struct Report {
    /// What was asked for.
    pub config: BenchNetConfig,
    /// Frames in flight per queue at most: fewer than asked for where frames take several buffers.
    pub in_flight: u16,
    /// The shared memory is in pages of 2 MiB.
    pub huge_pages: bool,
    /// How long was measured.
    pub elapsed: Duration,
    /// Frames received in that time.
    pub frames: u64,
    /// Bytes of those frames.
    pub bytes: u64,
    /// Frames sent.
    pub sent: u64,
    /// Frames received, or in mode `send` taken by the back-end.
    pub received: u64,
    /// Frames that never came back.
    pub lost: u64,
    /// Frames looked at that were not what was sent, or out of order.
    pub mismatched: u64,
    /// Kicks that the back-end asked for in the measured time.
    pub kicks: u64,
    /// Times there and back, in nanoseconds, of the frames looked at.
    pub latency: Histogram,
    /// CPU time of the back-end in the measured time, in nanoseconds.
    pub backend_cpu: Option<u64>,
}

#[expect(clippy::cast_precision_loss, reason = "rates, shown with a few digits")]
impl Report {
    /// Million frames per second.
    #[must_use]
    pub fn mpps(&self) -> f64 {
        self.frames as f64 / self.elapsed.as_secs_f64() / 1e6
    }

    /// 10^9 bits of frames per second, without what a wire adds.
    #[must_use]
    pub fn gbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }

    /// CPU time of the back-end per frame, in nanoseconds.
    #[must_use]
    pub fn backend_ns_per_frame(&self) -> Option<f64> {
        let time = self.backend_cpu? as f64;
        (self.frames > 0).then(|| time / self.frames as f64)
    }

    /// The share of one core that the back-end used; more than 1 with several threads.
    #[must_use]
    pub fn backend_share(&self) -> Option<f64> {
        Some(self.backend_cpu? as f64 / self.elapsed.as_nanos() as f64)
    }

    /// Everything, in one object.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut latency = serde_json::Map::new();
        latency.insert("samples".to_owned(), self.latency.samples().into());
        for (key, _, per_mille) in PERCENTILES {
            latency.insert(key.to_owned(), self.latency.percentile(per_mille).into());
        }
        latency.insert("max".to_owned(), self.latency.max().into());
        json!({
            "sockets": self.config.sockets,
            "format": self.format(),
            "mode": self.mode(),
            "size": self.size(),
            "queues": self.config.queues,
            "ring_size": self.config.ring_size,
            "in_flight": self.in_flight,
            "chains": match self.config.chains {
                Chains::Direct => "direct",
                Chains::Indirect => "indirect",
            },
            "in_order": self.config.in_order,
            "mergeable": self.config.mergeable,
            "tso": self.config.tso,
            "event_idx": self.config.event_idx,
            "core": self.config.core,
            "huge_pages": self.huge_pages,
            "seconds": self.elapsed.as_secs_f64(),
            "frames": self.frames,
            "mpps": self.mpps(),
            "gbit_per_s": self.gbit_per_s(),
            "latency_ns": latency,
            "sent": self.sent,
            "received": self.received,
            "lost": self.lost,
            "mismatched": self.mismatched,
            "kicks": self.kicks,
            "backend_cpu_ns": self.backend_cpu,
            "backend_cpu_ns_per_frame": self.backend_ns_per_frame(),
        })
    }

    fn format(&self) -> &'static str {
        if self.config.packed {
            "packed"
        } else {
            "split"
        }
    }

    fn mode(&self) -> &'static str {
        match self.config.mode {
            BenchMode::Flood => "flood",
            BenchMode::PingPong => "pingpong",
            BenchMode::Send => "send",
        }
    }

    fn size(&self) -> Value {
        match self.config.size {
            FrameSize::Fixed(bytes) => bytes.into(),
            FrameSize::Mix => "mix".into(),
        }
    }

    /// What became of the frames, and when.
    fn write_fate(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.config.mode == BenchMode::Send {
            return write!(
                f,
                "frames    {} sent, {} taken, {} left, {} kicks",
                self.sent, self.received, self.lost, self.kicks
            );
        }
        write!(f, "latency  ")?;
        for (_, name, per_mille) in PERCENTILES {
            write!(f, " {name} {},", self.latency.percentile(per_mille))?;
        }
        let (max, samples) = (self.latency.max(), self.latency.samples());
        writeln!(f, " max {max} ns ({samples} samples)")?;
        write!(
            f,
            "frames    {} sent, {} received, {} lost, {} mismatched, {} kicks",
            self.sent, self.received, self.lost, self.mismatched, self.kicks
        )
    }

    fn features(&self) -> String {
        let flags = [
            (self.config.chains == Chains::Indirect, "indirect"),
            (self.config.in_order, "in-order"),
            (self.config.mergeable, "mergeable"),
            (self.config.event_idx, "event-idx"),
            (self.config.tso, "tso"),
        ];
        let set = flags.into_iter().filter(|(set, _)| *set);
        set.map(|(_, name)| format!(", {name}")).collect()
    }
}

/// How many queue pairs, of how many devices.
fn devices(config: &BenchNetConfig) -> String {
    match config.sockets.len() {
        1 => config.queues.to_string(),
        devices => format!("{} each of {devices} devices", config.queues),
    }
}

impl fmt::Display for Report {
    /// The table, without a line end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.config.size {
            FrameSize::Fixed(bytes) => format!("{bytes} B"),
            FrameSize::Mix => "7 x 64, 4 x 590, 1 x 1518 B".to_owned(),
        };
        let (config, pages) = (
            &self.config,
            if self.huge_pages { "2 MiB" } else { "small" },
        );
        writeln!(
            f,
            "load      {}, {size} frames, {} in flight per queue, {:.1} s",
            self.mode(),
            self.in_flight,
            self.elapsed.as_secs_f64()
        )?;
        writeln!(
            f,
            "queues    {}, {} rings of {}{}, {pages} pages",
            devices(config),
            self.format(),
            config.ring_size,
            self.features()
        )?;
        writeln!(
            f,
            "rate      {:.3} Mpps, {:.3} Gbit/s",
            self.mpps(),
            self.gbit_per_s()
        )?;
        self.write_fate(f)?;
        if let (Some(per_frame), Some(share)) = (self.backend_ns_per_frame(), self.backend_share())
        {
            write!(
                f,
                "\nback-end  {per_frame:.1} ns of CPU time per frame, {:.0} % of a core",
                share * 100.0
            )?;
        }
        Ok(())
    }
}
