//! A measurement from connecting to the last frame awaited.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::super::BenchError;
use super::super::client::{Client, PROTOCOL_MQ, Vring, require};
use super::super::memory::Memory;
use super::super::ring::{LoadRing, NotInFlight, PackedLoad, SplitLoad};
use super::super::watch::{Line, cpu_time};
use super::layout::Layout;
use super::mirror::Mirror;
use super::pair::{Pair, QueuePair, Tally};
use super::report::Report;
use crate::config::{BenchNetConfig, Chains};
use crate::memory::GuestRam;
use crate::ring::{RingFormat, VringBase};
use crate::sys::cpu;

/// Rounds over all queues between two looks at the clock.
const ROUNDS: usize = 16;
/// What comes before the measured time: a tenth of it, but not more than this.
const WARM_UP_MAX: Duration = Duration::from_millis(250);
/// How often it is looked whether the back-end is still there.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Frames that are missing for so long, with none arriving, are not waited for before others are
/// sent.
const WRITE_OFF_AFTER: Duration = Duration::from_millis(500);
/// After so long without any frame the back-end is taken for dead.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// How long after the last frame others are awaited at the end.
const DRAIN: Duration = Duration::from_millis(500);

/// Connects, measures, and says what was found.
///
/// # Errors
/// [`BenchError`]; none takes longer than some seconds beyond the time to be measured.
pub fn run(config: &BenchNetConfig) -> Result<Report, BenchError> {
    cpu::pin_to_core(config.core).map_err(BenchError::Core)?;
    if config.packed {
        load::<PackedLoad>(config)
    } else {
        load::<SplitLoad>(config)
    }
}

fn load<R: LoadRing>(config: &BenchNetConfig) -> Result<Report, BenchError> {
    let clients = config.sockets.iter().map(|socket| connect(config, socket));
    let clients: Vec<_> = clients.collect::<Result<_, _>>()?;
    let far = config.far.as_ref().map(|far| connect(config, far));
    let far_client = far.transpose()?;
    let layout = Layout::new::<R::Format>(config);
    let start = Instant::now();
    // The pairs of all devices are numbered through: no frame of one is taken for another's.
    let near = |(number, client)| {
        let first = u64::from(config.queues) * number;
        let pair = |ram: &_, queue| Pair::new(config, ram, &layout, queue, first, start);
        End::new(config, client, &layout, pair)
    };
    let far = |client| {
        let mirror = |ram: &_, queue| Mirror::new(config, ram, &layout, queue);
        End::new(config, client, &layout, mirror)
    };
    let mut load = Load::<R> {
        config,
        near: (0..).zip(clients).map(near).collect::<Result<_, _>>()?,
        far: far_client.map(far).transpose()?,
        tally: Tally::default(),
        last_frame: start,
        last_look: start,
        seen: 0,
    };
    load.start(&layout)?;
    load.measure(layout.in_flight(config))
}

/// A session with one of the back-end's ports, up to what is negotiated.
fn connect(config: &BenchNetConfig, socket: &Path) -> Result<Client, BenchError> {
    let mut client = Client::connect(socket)?;
    let wanted = features(config, &client)?;
    let several = config.queues > 1;
    client.negotiate(wanted, if several { PROTOCOL_MQ } else { 0 })?;
    if several {
        let offered = client.queue_num()?;
        if offered < u64::from(config.queues) {
            return Err(BenchError::Queues {
                queues: config.queues,
                offered,
            });
        }
    }
    Ok(client)
}

/// Shares the memory, starts and enables the vrings with these eventfds, kick and call.
fn start_vrings<'a, F: RingFormat>(
    client: &mut Client,
    memory: &Memory,
    layout: &Layout,
    size: u16,
    eventfds: impl Iterator<Item = (&'a EventFd, &'a EventFd)>,
) -> Result<(), BenchError> {
    client.share(memory.region(), memory.fd())?;
    let mut count = 0;
    for (index, (kick, call)) in (0..).zip(eventfds) {
        client.start(&Vring {
            index,
            size,
            base: VringBase::fresh(F::PACKED).to_u32(F::PACKED),
            at: layout.place(index as usize).rings_at(),
            kick: kick.as_raw_fd(),
            call: call.as_raw_fd(),
        })?;
        count = index + 1;
    }
    (0..count).try_for_each(|index| client.enable(index))
}

/// A port with its queue pairs: under load, or at the far end.
struct End<P> {
    client: Client,
    memory: Memory,
    pairs: Vec<P>,
}

impl<P: QueuePair> End<P> {
    /// A port with as many pairs as are asked for, each made by `pair` in the memory that is shown.
    fn new(
        config: &BenchNetConfig,
        client: Client,
        layout: &Layout,
        pair: impl Fn(&Arc<GuestRam>, u16) -> Result<P, BenchError>,
    ) -> Result<Self, BenchError> {
        let memory = layout.memory()?;
        let pair = |queue| pair(&memory.ram, queue);
        Ok(Self {
            client,
            pairs: (0..config.queues).map(pair).collect::<Result<_, _>>()?,
            memory,
        })
    }

    fn start<F: RingFormat>(&mut self, layout: &Layout, size: u16) -> Result<(), BenchError> {
        let eventfds = self.pairs.iter().flat_map(QueuePair::eventfds);
        start_vrings::<F>(&mut self.client, &self.memory, layout, size, eventfds)?;
        self.pairs.iter().for_each(QueuePair::wake);
        self.client.fall_silent()
    }
}

/// The device features to acknowledge, all of which are offered.
fn features(config: &BenchNetConfig, client: &Client) -> Result<u64, BenchError> {
    let flag = |set: bool, flag: &str| set.then(|| flag.to_owned());
    let queues = || {
        flag(
            config.queues > 1,
            &format!("--queues \"{}\"", config.queues),
        )
    };
    let wanted = [
        (
            Some("bench net".to_owned()),
            VIRTIO_F_VERSION_1,
            "VIRTIO_F_VERSION_1",
        ),
        (
            flag(config.packed, "--format \"packed\""),
            VIRTIO_F_RING_PACKED,
            "VIRTIO_F_RING_PACKED",
        ),
        (
            flag(config.chains == Chains::Indirect, "--chains \"indirect\""),
            VIRTIO_RING_F_INDIRECT_DESC,
            "VIRTIO_F_INDIRECT_DESC",
        ),
        (
            flag(config.in_order, "--in-order"),
            VIRTIO_F_IN_ORDER,
            "VIRTIO_F_IN_ORDER",
        ),
        (
            flag(config.mergeable, "--mergeable"),
            VIRTIO_NET_F_MRG_RXBUF,
            "VIRTIO_NET_F_MRG_RXBUF",
        ),
        (
            flag(config.event_idx, "--event-idx"),
            VIRTIO_RING_F_EVENT_IDX,
            "VIRTIO_F_EVENT_IDX",
        ),
        (queues(), VIRTIO_NET_F_MQ, "VIRTIO_NET_F_MQ"),
        (
            flag(config.tso, "--tso"),
            VIRTIO_NET_F_CSUM,
            "VIRTIO_NET_F_CSUM",
        ),
        (
            flag(config.tso, "--tso"),
            VIRTIO_NET_F_HOST_TSO4,
            "VIRTIO_NET_F_HOST_TSO4",
        ),
    ];
    let mask = require(client.features(), wanted)?;
    let mq = PROTOCOL_MQ.trailing_zeros();
    require(
        client.protocol(),
        [(queues(), mq, "VHOST_USER_PROTOCOL_F_MQ")],
    )?;
    Ok(mask)
}

/// A measurement under way.
struct Load<'a, R> {
    config: &'a BenchNetConfig,
    near: Vec<End<Pair<R>>>,
    /// Sends all back.
    far: Option<End<Mirror<R>>>,
    tally: Tally,
    /// When it was seen last that a frame had arrived, and how many there were then.
    last_frame: Instant,
    seen: u64,
    /// When it was looked last whether the back-end is there.
    last_look: Instant,
}

impl<R: LoadRing> Load<'_, R> {
    /// Starts and enables the vrings, those of the far end first.
    fn start(&mut self, layout: &Layout) -> Result<(), BenchError> {
        let size = self.config.ring_size;
        // First, so that there is somebody when the first frame is sent.
        if let Some(far) = &mut self.far {
            far.start::<R::Format>(layout, size)?;
        }
        let mut near = self.near.iter_mut();
        near.try_for_each(|device| device.start::<R::Format>(layout, size))
    }

    fn measure(mut self, in_flight: u16) -> Result<Report, BenchError> {
        let warm_up = (self.config.duration / 10).min(WARM_UP_MAX);
        let mut line = Line::new(self.config.json, (1e6, "Mpps"));
        self.last_frame = Instant::now();
        self.flood(self.last_frame + warm_up, &mut line)?;
        // Nothing is measured before the first frame is back.
        while self.tally.received == 0 {
            self.flood(Instant::now(), &mut line)?;
        }
        let cpu_before = cpu_time(self.config.pid)?;
        let (frames_before, bytes_before) = (self.tally.received, self.tally.bytes);
        let kicks_before = self.tally.kicks;
        self.tally.latency.clear();
        let start = Instant::now();
        self.flood(start + self.config.duration, &mut line)?;
        let elapsed = start.elapsed();
        let cpu_after = cpu_time(self.config.pid)?;
        let (frames, bytes) = (self.tally.received, self.tally.bytes);
        let latency = self.tally.latency.clone();
        let kicks = self.tally.kicks - kicks_before;
        self.drain()?;
        if let Some(queue) = self.pairs().position(Pair::is_dead) {
            return Err(BenchError::Unserved {
                queue,
                queues: self.pairs().count(),
            });
        }
        Ok(Report {
            config: self.config.clone(),
            in_flight,
            huge_pages: self.near.iter().all(|device| device.memory.huge),
            elapsed,
            frames: frames - frames_before,
            bytes: bytes - bytes_before,
            sent: self.tally.sent,
            received: self.tally.received,
            lost: self.missing(),
            mismatched: self.tally.mismatched,
            kicks,
            latency,
            backend_cpu: cpu_after
                .zip(cpu_before)
                .map(|(after, before)| after.saturating_sub(before)),
        })
    }

    /// Sends and receives until `end`, one round at least.
    fn flood(&mut self, end: Instant, line: &mut Line) -> Result<(), BenchError> {
        loop {
            for _ in 0..ROUNDS {
                self.round(true)?;
            }
            let now = Instant::now();
            self.look_after(now)?;
            line.show(now, self.tally.received);
            if now >= end {
                return Ok(());
            }
        }
    }

    /// One turn of every queue.
    #[inline]
    fn round(&mut self, send: bool) -> Result<(), BenchError> {
        let failed = |queue, fault: NotInFlight| BenchError::Ring {
            queue,
            problem: fault.to_string(),
        };
        if let Some(far) = &mut self.far {
            for (queue, mirror) in far.pairs.iter_mut().enumerate() {
                let turn = mirror.turn(&mut self.tally);
                turn.map_err(|fault| failed(queue, fault))?;
            }
        }
        let pairs = self.near.iter_mut().flat_map(|device| &mut device.pairs);
        for (queue, pair) in pairs.enumerate() {
            let mut turn = || -> Result<(), NotInFlight> {
                pair.receive(&mut self.tally)?;
                if send {
                    pair.send(&mut self.tally)?;
                }
                Ok(())
            };
            turn().map_err(|fault| failed(queue, fault))?;
        }
        Ok(())
    }

    /// Whether the back-end is there and answers; gives frames up that it keeps for too long.
    fn look_after(&mut self, now: Instant) -> Result<(), BenchError> {
        if self.tally.received != self.seen {
            self.seen = self.tally.received;
            self.last_frame = now;
        }
        if now - self.last_look >= LOOK_EVERY {
            self.last_look = now;
            let near = self.near.iter().map(|device| &device.client);
            let far = self.far.as_ref().map(|far| &far.client);
            if near.chain(far).any(Client::is_closed) {
                return Err(BenchError::Gone {
                    received: self.tally.received,
                    what: "frames",
                });
            }
        }
        let silence = now - self.last_frame;
        if silence >= SILENCE_MAX {
            return Err(self.silent(silence));
        }
        if silence >= WRITE_OFF_AFTER {
            let pairs = self.near.iter_mut().flat_map(|device| &mut device.pairs);
            pairs.for_each(Pair::write_off);
        }
        Ok(())
    }

    /// Waits for the frames in flight; those that don't come are lost.
    fn drain(&mut self) -> Result<(), BenchError> {
        let before = self.tally.received;
        self.last_frame = Instant::now();
        while self.missing() > 0 {
            self.round(false)?;
            let now = Instant::now();
            // A back-end that loses frames sends others back: if none comes at all, it is dead.
            self.look_after(now)?;
            if self.tally.received > before && now - self.last_frame >= DRAIN {
                break;
            }
        }
        Ok(())
    }

    fn missing(&self) -> u64 {
        self.pairs().map(Pair::missing).sum()
    }

    /// The queue pairs of all devices.
    fn pairs(&self) -> impl Iterator<Item = &Pair<R>> {
        self.near.iter().flat_map(|device| &device.pairs)
    }

    fn silent(&self, silence: Duration) -> BenchError {
        BenchError::Silent {
            missing: self.missing(),
            received: self.tally.received,
            what: "frames",
            silence,
        }
    }
}
