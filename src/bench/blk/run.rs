//! A measurement from connecting to the last block read back.

use std::os::fd::AsRawFd;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::super::BenchError;
use super::super::client::{Client, PROTOCOL_CONFIG, PROTOCOL_MQ, Vring, require};
use super::super::memory::Memory;
use super::super::ring::{LoadRing, PackedLoad, SplitLoad};
use super::super::watch::{Line, cpu_time};
use super::layout::Layout;
use super::queue::{Queue, SECTOR_BYTES};
use super::report::{Disk, Report};
use super::verify::Verify;
use super::work::Work;
use super::worker::{MEASURED, MEASURING, Order, Outcome, Shown, Worker};
use crate::config::{BenchBlkConfig, Chains, RwKind, Span};
use crate::ring::{RingFormat, VringBase};
use crate::sync::{AtomicBool, Ordering};
use crate::sys::clock::Clock;
use crate::sys::cpu;

/// What comes before the measured time: a tenth of it, but not more than this.
const RAMP_MAX: Duration = Duration::from_millis(250);
/// How often it is looked whether the back-end is still there.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// After so long without any answer the back-end is taken for dead: a slow disk's flush takes less.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Blocks of a queue that can be kept track of.
const TRACKED_MAX: u64 = 1 << 30;
/// Memory for requests and data at most.
const MEMORY_MAX: u64 = 64 << 30;

/// Connects, measures, and says what was found.
///
/// # Errors
/// [`BenchError`]; a back-end that stops answering is given up after ten seconds.
pub fn run(config: &BenchBlkConfig) -> Result<Report, BenchError> {
    if config.packed {
        load::<PackedLoad>(config)
    } else {
        load::<SplitLoad>(config)
    }
}

fn load<R: LoadRing + Send>(config: &BenchBlkConfig) -> Result<Report, BenchError> {
    let layout = Layout::new::<R::Format>(config).ok_or(BenchError::Descriptors {
        ring_size: config.ring_size.map_or(32768, u32::from),
        depth: config.io_depth,
    })?;
    if layout.bytes() > MEMORY_MAX {
        return Err(BenchError::TooMuch {
            bytes: layout.bytes(),
        });
    }
    let mut client = Client::connect(&config.socket)?;
    let wanted = features(config, &client)?;
    client.negotiate(wanted, PROTOCOL_MQ | PROTOCOL_CONFIG)?;
    let disk = disk(config, &mut client, wanted)?;
    let memory = Memory::new(layout.bytes())?;
    let clock = Clock::new();
    let seed = config.seed.unwrap_or_else(any_seed);
    let mut queues = Vec::new();
    for number in 0..config.queues {
        let (work, verify) = share(config, &disk, number, seed)?;
        let queue = Queue::<R>::new(config, &memory.ram, &layout, number, work, verify)?;
        queues.push(queue);
    }
    start(&mut client, &memory, &layout, &queues)?;
    let measured = measure(config, &client, queues, clock)?;
    Ok(Report {
        config: config.clone(),
        disk,
        ring_size: layout.ring_size,
        huge_pages: memory.huge,
        seed,
        elapsed: measured.outcomes.iter().map(|it| it.elapsed).max(),
        nanos_per_tick: clock.nanos_per_tick(),
        backend: measured.backend,
        outcomes: measured.outcomes,
    })
}

/// The device features to acknowledge, all of which are offered.
fn features(config: &BenchBlkConfig, client: &Client) -> Result<u64, BenchError> {
    let flag = |set: bool, flag: &str| set.then(|| flag.to_owned());
    let queues = || {
        flag(
            config.queues > 1,
            &format!("--queues \"{}\"", config.queues),
        )
    };
    let rw = format!("--rw \"{}\"", config.rw.name());
    let wanted = [
        (
            flag(true, "bench blk"),
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
            flag(config.event_idx, "--event-idx"),
            VIRTIO_RING_F_EVENT_IDX,
            "VIRTIO_F_EVENT_IDX",
        ),
        (queues(), VIRTIO_BLK_F_MQ, "VIRTIO_BLK_F_MQ"),
        (
            config.fsync.map(|writes| format!("--fsync \"{writes}\"")),
            VIRTIO_BLK_F_FLUSH,
            "VIRTIO_BLK_F_FLUSH",
        ),
        (
            flag(config.rw.kind == RwKind::Trim, &rw),
            VIRTIO_BLK_F_DISCARD,
            "VIRTIO_BLK_F_DISCARD",
        ),
    ];
    let mask = require(client.features(), wanted)?;
    let protocol = [
        (
            queues(),
            PROTOCOL_MQ.trailing_zeros(),
            "VHOST_USER_PROTOCOL_F_MQ",
        ),
        (
            flag(true, "bench blk"),
            PROTOCOL_CONFIG.trailing_zeros(),
            "VHOST_USER_PROTOCOL_F_CONFIG",
        ),
    ];
    require(client.protocol(), protocol)?;
    // What a guest takes where it is offered. Without FLUSH every write would have to be durable.
    let taken = [
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX,
    ];
    let taken = taken.into_iter().fold(0, |mask, bit| mask | 1 << bit);
    Ok(mask | (client.features() & taken))
}

/// Reads config space (VIRTIO 1.3 §5.2.4) and checks what is asked for against it.
fn disk(config: &BenchBlkConfig, client: &mut Client, features: u64) -> Result<Disk, BenchError> {
    let space: [u8; 60] = client.config()?;
    let word = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| space[at + i]));
    let sectors = u64::from(word(0)) | (u64::from(word(4)) << 32);
    let has = |bit: u32| features & (1 << bit) != 0;
    let disk = Disk {
        bytes: sectors.saturating_mul(SECTOR_BYTES),
        block_bytes: if has(VIRTIO_BLK_F_BLK_SIZE) {
            word(20)
        } else {
            512
        },
    };
    if config.queues > 1 {
        let offered = u64::from(u16::from_le_bytes([space[34], space[35]]));
        let offered = offered.min(client.queue_num()?);
        if offered < u64::from(config.queues) {
            return Err(BenchError::Queues {
                queues: config.queues,
                offered,
            });
        }
    }
    if has(VIRTIO_BLK_F_RO) && config.rw.kind != RwKind::Read {
        let rw = config.rw.name();
        return Err(BenchError::ReadOnly { rw });
    }
    if disk.block_bytes == 0 || !config.block_bytes.is_multiple_of(disk.block_bytes) {
        return Err(BenchError::BlockSize {
            asked: config.block_bytes,
            disk: disk.block_bytes,
        });
    }
    if config.rw.kind == RwKind::Trim && u64::from(word(36)) * SECTOR_BYTES < bytes_of(config) {
        return Err(BenchError::Discard {
            asked: config.block_bytes,
            sectors: word(36),
        });
    }
    Ok(disk)
}

fn bytes_of(config: &BenchBlkConfig) -> u64 {
    u64::from(config.block_bytes)
}

/// What queue `number` does, and where. In sequence, and where blocks are verified, every queue has
/// a range of its own.
fn share(
    config: &BenchBlkConfig,
    disk: &Disk,
    number: u16,
    seed: u64,
) -> Result<(Work, Option<Verify>), BenchError> {
    let block = bytes_of(config);
    let (offset, rest) = (config.offset, disk.bytes.saturating_sub(config.offset));
    let size = config.size.unwrap_or(rest - rest % block);
    if size == 0 || size > rest {
        return Err(BenchError::Range {
            offset,
            size,
            disk: disk.bytes,
        });
    }
    let (first, all) = (offset / block, size / block);
    let (number, queues) = (u64::from(number), u64::from(config.queues));
    let apart = !config.rw.random || config.verify;
    let (from, to) = (all * number / queues, all * (number + 1) / queues);
    let (first, blocks) = if apart {
        (first + from, to - from)
    } else {
        (first, all)
    };
    let least = if config.verify { config.io_depth } else { 1 };
    if blocks < u64::from(least) {
        return Err(BenchError::FewBlocks { blocks, least });
    }
    let left = match config.span {
        Span::Runtime(_) => u64::MAX,
        Span::Loops(loops) => (to - from).saturating_mul(u64::from(loops)),
    };
    let work = Work::new(config.rw, config.read_percent, first, blocks, left);
    let work = work.seeded(seed ^ number << 32);
    if !config.verify {
        return Ok((work, None));
    }
    let tracked = usize::try_from(blocks).ok();
    let tracked = tracked.filter(|_| blocks <= TRACKED_MAX);
    let tracked = tracked.ok_or(BenchError::ManyBlocks {
        blocks,
        most: TRACKED_MAX,
    })?;
    let others = (config.rw.kind == RwKind::Read).then_some(config.seed);
    let verify = Verify::new(first, tracked, config.block_bytes, seed, others);
    Ok((work, Some(verify)))
}

/// Shares the memory, starts and enables the vrings.
fn start<R: LoadRing>(
    client: &mut Client,
    memory: &Memory,
    layout: &Layout,
    queues: &[Queue<R>],
) -> Result<(), BenchError> {
    client.share(memory.region(), memory.fd())?;
    let base = VringBase::fresh(R::Format::PACKED).to_u32(R::Format::PACKED);
    for (number, queue) in (0..).zip(queues) {
        let (kick, call) = queue.eventfds();
        client.start(&Vring {
            index: u32::from(number),
            size: layout.ring_size,
            base,
            at: layout.place(number).rings_at(),
            kick: kick.as_raw_fd(),
            call: call.as_raw_fd(),
        })?;
    }
    for (index, _) in (0..).zip(queues) {
        client.enable(index)?;
    }
    client.fall_silent()
}

/// What the threads found, and the CPU time that the back-end needed for how many requests.
struct Measured {
    outcomes: Vec<Outcome>,
    backend: Option<Backend>,
}

/// The back-end's CPU time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backend {
    /// Nanoseconds of all its threads.
    pub cpu: u64,
    /// Requests done meanwhile.
    pub requests: u64,
    /// How long that was.
    pub elapsed: Duration,
}

fn measure<R: LoadRing + Send>(
    config: &BenchBlkConfig,
    client: &Client,
    queues: Vec<Queue<R>>,
    clock: Clock,
) -> Result<Measured, BenchError> {
    if let Some(core) = config.cores.first() {
        // What this thread does must not disturb the back-end's core.
        cpu::pin_to_core(*core).map_err(BenchError::Cores)?;
    }
    let threads = usize::from(config.threads);
    let shown: Vec<Shown> = (0..threads).map(|_| Shown::default()).collect();
    let stop = AtomicBool::new(false);
    let mut parts: Vec<Vec<Queue<R>>> = (0..threads).map(|_| Vec::new()).collect();
    for (number, queue) in queues.into_iter().enumerate() {
        parts[number % threads].push(queue);
    }
    thread::scope(|scope| {
        let watcher = thread::current();
        let mut handles = Vec::new();
        for (number, part) in parts.into_iter().enumerate() {
            let order = order(config, number);
            let worker = Worker::new(part, clock, &shown[number], &stop);
            let watcher = watcher.clone();
            let stop = &stop;
            handles.push(scope.spawn(move || {
                let outcome = worker.run(&order, || watcher.unpark());
                if outcome.is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
                watcher.unpark();
                outcome
            }));
        }
        let watch = Watch {
            config,
            client,
            shown: &shown,
            stop: &stop,
        };
        let watched = watch.until_done(&handles);
        stop.store(true, Ordering::Relaxed);
        let mut outcomes = Vec::new();
        let mut stopped = None;
        for handle in handles {
            match handle.join() {
                Ok(Ok(outcome)) => outcomes.push(outcome),
                Ok(Err(BenchError::Stopped)) => stopped = Some(BenchError::Stopped),
                Ok(Err(error)) => return Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        let backend = watched?;
        stopped.map_or(Ok(Measured { outcomes, backend }), Err)
    })
}

fn order(config: &BenchBlkConfig, number: usize) -> Order {
    let core = number.checked_rem(config.cores.len());
    Order {
        core: core.map(|at| config.cores[at]),
        ramp: match config.span {
            Span::Runtime(span) => config.ramp.unwrap_or((span / 10).min(RAMP_MAX)),
            Span::Loops(_) => Duration::ZERO,
        },
        span: config.span,
        read_back: config.verify && config.rw.kind != RwKind::Read,
    }
}

/// What the main thread does meanwhile.
struct Watch<'a> {
    config: &'a BenchBlkConfig,
    client: &'a Client,
    shown: &'a [Shown],
    /// Set when a worker has met an error.
    stop: &'a AtomicBool,
}

type Outcomes<'s> = [ScopedJoinHandle<'s, Result<Outcome, BenchError>>];

impl Watch<'_> {
    /// Waits for the workers, shows how far they are, and reads the back-end's CPU time when all of
    /// them begin to measure and when all have done so.
    fn until_done(&self, handles: &Outcomes<'_>) -> Result<Option<Backend>, BenchError> {
        let mut line = Line::new(self.config.json, (1e3, "K IOPS"));
        let mut last = (self.done(), Instant::now());
        let (mut began, mut backend) = (None, None);
        loop {
            let over = handles.iter().all(ScopedJoinHandle::is_finished);
            let all_measured = self.shown.iter().all(|it| it.phase.get() >= MEASURED);
            let now = Instant::now();
            if began.is_none() && self.shown.iter().all(|it| it.phase.get() >= MEASURING) {
                began = Some((cpu_time(self.config.pid)?, self.done(), now));
            }
            if let (Some((before, done, start)), true, None) = (began, all_measured, backend) {
                let times = cpu_time(self.config.pid)?.zip(before);
                backend = times.map(|(after, before)| Backend {
                    cpu: after.saturating_sub(before),
                    requests: self.done() - done,
                    elapsed: now - start,
                });
            }
            if over || self.stop.load(Ordering::Relaxed) {
                return Ok(backend);
            }
            line.show(now, self.done());
            if self.done() != last.0 {
                last = (self.done(), now);
            }
            let what = "requests";
            if self.client.is_closed() {
                let received = self.done();
                return Err(BenchError::Gone { received, what });
            }
            if now - last.1 >= SILENCE_MAX {
                return Err(BenchError::Silent {
                    missing: self.shown.iter().map(|it| it.in_flight.get()).sum(),
                    received: self.done(),
                    what,
                    silence: now - last.1,
                });
            }
            thread::park_timeout(LOOK_EVERY);
        }
    }

    fn done(&self) -> u64 {
        self.shown.iter().map(|it| it.done.get()).sum()
    }
}

/// A seed that no other run has.
fn any_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = since.unwrap_or_default().as_nanos();
    let low = u64::try_from(nanos & u128::from(u64::MAX)).unwrap_or_default();
    low ^ u64::from(std::process::id()) << 32
}
