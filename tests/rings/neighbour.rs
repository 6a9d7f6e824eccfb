//! One ring breaks; the rings beside it, of the same device and of another, on the same worker, go
//! on with every byte and no slower, afterwards and while it happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::device::RingOptions;
use vringd::device::blk::{BlkModel, BlkSetup};
use vringd::engine::{Backing, Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts};
use vringd::memory::Store;
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, read_guest, write_guest};

use crate::support::deadline::wait_until;

use super::port::{PATIENCE, Port, fresh, model, payload};

/// VIRTIO_RING_F_INDIRECT_DESC.
const INDIRECT: u64 = 1 << 28;
/// Buffers and tables of the one who breaks the ring, where the others have none.
const JUNK: u64 = 0x3f_0000;
/// What the machine's other business may cost: 640 frames take a millisecond or two, and a ring
/// that is only looked at between sleeps would take seconds for them.
const DISTURBED: Duration = Duration::from_millis(200);
const NOWHERE: u64 = 1 << 50;
/// Bytes before a frame.
const HEADER: u32 = 12;
/// What a rate is taken over.
const WINDOW: Duration = Duration::from_millis(4);
/// Frames in a window without which nothing can be told: a neighbour that gets no time of the
/// machine loses none to a ring that breaks. A quiet machine moves ten times as many.
const ENOUGH: u64 = 200;
/// How often a ring is broken before it is said that its neighbour suffers.
const TRIES: usize = 40;

const TABLE: u64 = JUNK + 0x1000;

/// Flags of descriptors.
const NEXT: u16 = 1;
const IS_TABLE: u16 = 4;

/// A way to break a transmit ring of which the driver has all descriptors.
#[derive(Debug, Clone, Copy)]
pub enum Defect {
    Unmapped,
    HugeLength,
    EndlessChain,
    ReadableAfterWritable,
    NestedIndirect,
    ChainedIndirect,
    OddTable,
    /// The address of its end.
    WrappingAddress,
    /// The sum of its lengths.
    WrappingSum,
    /// Split only.
    AvailJump,
    /// Split only.
    HeadOutside,
    /// Split only.
    NextOutside,
}

impl Defect {
    const BOTH: [Defect; 9] = [
        Defect::Unmapped,
        Defect::HugeLength,
        Defect::EndlessChain,
        Defect::ReadableAfterWritable,
        Defect::NestedIndirect,
        Defect::ChainedIndirect,
        Defect::OddTable,
        Defect::WrappingAddress,
        Defect::WrappingSum,
    ];

    pub fn all(packed: bool) -> Vec<Defect> {
        let mut all = Defect::BOTH.to_vec();
        if !packed {
            all.extend([Defect::AvailJump, Defect::HeadOutside, Defect::NextOutside]);
        }
        all
    }

    pub fn commit<D: Driver>(self, driver: &mut D) {
        let size = driver.memory().size;
        let buf = |addr, len| Buf::readable(addr, len);
        let chain: Vec<(Buf, u16)> = match self {
            Defect::Unmapped => vec![(buf(NOWHERE, 64), 0)],
            Defect::HugeLength => vec![(buf(JUNK, u32::MAX), 0)],
            // The chain takes the whole ring, and its last descriptor says that there is more.
            Defect::EndlessChain => vec![(buf(JUNK, 64), NEXT); usize::from(size)],
            Defect::ReadableAfterWritable => {
                vec![(Buf::writable(JUNK, 64), NEXT), (buf(JUNK, 64), 0)]
            }
            Defect::NestedIndirect => {
                driver.add_indirect(&[buf(JUNK, 64)], TABLE).unwrap();
                let flags_at = if D::Format::PACKED { 14 } else { 12 };
                write_guest(&driver.memory().ram, TABLE + flags_at, &[4, 0]);
                driver.publish();
                return;
            }
            Defect::ChainedIndirect => vec![(buf(JUNK, 16), IS_TABLE | NEXT), (buf(JUNK, 64), 0)],
            Defect::OddTable => vec![(buf(JUNK, 17), IS_TABLE)],
            Defect::WrappingAddress => vec![(buf(u64::MAX - 7, 16), 0)],
            Defect::WrappingSum => vec![(buf(JUNK, 0x1000), NEXT), (buf(0, u32::MAX), 0)],
            Defect::AvailJump => {
                let idx = driver.raw().driver.load16(2);
                driver.raw().driver.store16(2, idx.wrapping_add(size + 9));
                return;
            }
            Defect::HeadOutside => {
                let idx = driver.raw().driver.load16(2);
                let place = 4 + 2 * usize::from(idx % size);
                driver.raw().driver.store16(place, size);
                driver.raw().driver.store16(2, idx.wrapping_add(1));
                return;
            }
            Defect::NextOutside => {
                let chain = [(buf(JUNK, 64), NEXT), (buf(JUNK, 64), 0)];
                let head = driver.add_raw(&chain).unwrap();
                let next = usize::from(head) * 16 + 14;
                driver.raw().desc.store16(next, size);
                driver.publish();
                return;
            }
        };
        driver.add_raw(&chain).unwrap();
        driver.publish();
    }
}

/// Frames there and back on an echo port, every byte compared. Returns how long it took.
pub(super) fn traffic<D: Driver>(port: &mut Port<D>, pair: u16, rounds: u64) -> Duration {
    let start = Instant::now();
    for round in 0..rounds {
        let frame = |number| {
            payload(
                round * 32 + number,
                60 + usize::try_from(number * 37 % 1400).unwrap(),
            )
        };
        port.post(pair, 32);
        (0..32).for_each(|number| port.send(pair, number, &frame(number)));
        for number in 0..32 {
            let got = port.receive(pair, number);
            assert!(got == frame(number), "round {round}, frame {number}");
        }
        (0..32).for_each(|_| port.await_sent(pair));
    }
    start.elapsed()
}

/// The best of five: what else runs on the machine is not asked about.
fn pace<D: Driver>(port: &mut Port<D>, pair: u16) -> Duration {
    let times = (0..5).map(|_| traffic(port, pair, 20));
    times.min().unwrap_or_default()
}

fn ring_faults<D: Driver>(port: &Port<D>) -> u64 {
    let counters = port.handle.counters();
    let found = counters.iter().find(|(name, _)| *name == "ring_faults");
    found.map_or(0, |(_, count)| *count)
}

fn one_broken_ring<D: Driver>() {
    let models = [model("victim", 2), model("neighbour", 1)];
    let members = models.iter().map(|model| Member {
        parts: Parts::Net(Arc::clone(model), LinkSpec::Echo),
        cores: vec![0],
    });
    let options = EngineOptions {
        cores: vec![0],
        idle: IdlePolicy::Adaptive,
        stop_timeout: PATIENCE,
        ..EngineOptions::default()
    };
    let (engine, handles) = Engine::start(&options, members.collect()).unwrap();
    let port = |at: usize| Port::<D>::new(Arc::clone(&handles[at]), Arc::clone(&models[at]));
    let (mut victim, mut neighbour) = (port(0), port(1));
    (0..2).for_each(|index| neighbour.start(index));
    (0..4).for_each(|index| victim.start_with(index, INDIRECT, None));
    let before = [pace(&mut neighbour, 0), pace(&mut victim, 1)];
    for (count, defect) in (1..).zip(Defect::all(D::Format::PACKED)) {
        victim.stop(1);
        victim.drivers[1] = fresh(&victim.rings[1]);
        let err = EventFd::new(EFD_NONBLOCK).unwrap();
        victim.start_with(1, INDIRECT, Some(&err));
        traffic(&mut neighbour, 0, 1);
        defect.commit(&mut victim.drivers[1]);
        let told = wait_until("the err fd is written to", PATIENCE, || err.read().ok());
        assert_eq!(told, 1, "{defect:?}");
        let after = [pace(&mut neighbour, 0), pace(&mut victim, 1)];
        for (before, after) in before.into_iter().zip(after) {
            let most = 8 * before + DISTURBED;
            assert!(after < most, "{defect:?}: {before:?}, then {after:?}");
        }
        assert_eq!(ring_faults(&victim), count, "{defect:?}");
        assert!(err.read().is_err(), "{defect:?}: told once");
        assert_eq!(ring_faults(&neighbour), 0);
        assert_eq!(victim.drivers[1].used(), None, "{defect:?}");
    }
    // The one that was broken works again once it is made anew.
    for index in [0, 1] {
        victim.stop(index);
        victim.drivers[usize::from(index)] = fresh(&victim.rings[usize::from(index)]);
        victim.start_with(index, INDIRECT, None);
    }
    traffic(&mut victim, 0, 2);
    for port in [&mut victim, &mut neighbour] {
        for index in port.started.clone() {
            port.stop(index);
        }
    }
    engine.stop();
}

#[test]
fn one_broken_split_ring_disturbs_nobody() {
    one_broken_ring::<SplitDriver>();
}

#[test]
fn one_broken_packed_ring_disturbs_nobody() {
    one_broken_ring::<PackedDriver>();
}

/// Whose ring breaks: a transmit or a receive ring of a port, or a disk's.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Tx(Defect),
    Rx(Defect),
    Disk(Defect),
}

impl Victim {
    fn all(packed: bool) -> Vec<Victim> {
        let tx = Defect::all(packed).into_iter().map(Victim::Tx);
        // Of these the ring itself can tell, whatever the device wants of a chain.
        let every = [Defect::EndlessChain, Defect::OddTable];
        let rx = every.into_iter().map(Victim::Rx);
        let disk = every.into_iter().chain([Defect::Unmapped]);
        tx.chain(rx).chain(disk.map(Victim::Disk)).collect()
    }

    /// The device that it is a ring of, and its number.
    fn of<'a, D>(self, port: &'a mut Port<D>, disk: &'a mut Port<D>) -> (&'a mut Port<D>, u16)
    where
        D: Driver,
    {
        match self {
            Victim::Tx(_) => (port, 1),
            Victim::Rx(_) => (port, 0),
            Victim::Disk(_) => (disk, 0),
        }
    }

    /// Breaks a ring that was made anew; what the neighbour moved before and after.
    fn breaks<D: Driver>(self, devices: [&mut Port<D>; 2], frames: &AtomicU64) -> [Moved; 2] {
        let err = EventFd::new(EFD_NONBLOCK).unwrap();
        let [port, disk] = devices;
        let (owner, index) = self.of(port, disk);
        for index in owner.started.clone() {
            owner.stop(index);
            let at = usize::from(index);
            owner.drivers[at] = fresh(&owner.rings[at]);
        }
        owner.start_with(index, INDIRECT, Some(&err));
        if !matches!(self, Victim::Disk(_)) {
            owner.start_with(index ^ 1, INDIRECT, None);
        }
        let before = wait_until("the neighbour moves frames", PATIENCE, || {
            Some(Moved::usual(frames)).filter(|usual| usual.frames >= ENOUGH)
        });
        let (Victim::Tx(defect) | Victim::Rx(defect) | Victim::Disk(defect)) = self;
        defect.commit(&mut owner.drivers[usize::from(index)]);
        if matches!(self, Victim::Rx(_)) {
            // Nobody looks for buffers before there is a frame.
            owner.send(0, 0, &payload(1, 100));
        }
        // The time right after it: a worker that stands still for a part of it, once, is what is
        // looked for.
        let after = Moved::now(frames);
        wait_until("the err fd is written to", PATIENCE, || err.read().ok());
        [before, after]
    }
}

/// As `wait_until`, for what takes less than a sleep.
fn spin<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// Sends frames and compares every byte that comes back until it is `done`, counting.
fn keep_on<D: Driver>(port: &mut Port<D>, frames: &AtomicU64, done: &AtomicBool) {
    for round in 0.. {
        let frame = |number: u64| {
            payload(
                round * 8 + number,
                60 + usize::try_from(40 * number).unwrap(),
            )
        };
        port.post(0, 8);
        (0..8).for_each(|number| port.send(0, number, &frame(number)));
        for number in 0..8 {
            let (_, len) = spin("a frame comes", || port.drivers[0].used());
            let at = Port::<D>::buffer(0, number);
            let got = read_guest(&port.ram, at + u64::from(HEADER), (len - HEADER) as usize);
            assert!(got == frame(number), "round {round}, frame {number}");
            spin("the buffer is given back", || port.drivers[1].used());
        }
        frames.fetch_add(8, Ordering::Relaxed);
        if done.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// Frames of a window of time, and how long it was: its end may be noticed late.
#[derive(Clone, Copy)]
struct Moved {
    frames: u64,
    took: Duration,
}

impl Moved {
    /// In the window that begins now.
    fn now(frames: &AtomicU64) -> Moved {
        let (start, before) = (Instant::now(), frames.load(Ordering::Relaxed));
        std::thread::sleep(WINDOW);
        Moved {
            frames: frames.load(Ordering::Relaxed) - before,
            took: start.elapsed(),
        }
    }

    /// In the middle one of five, whatever else the machine does in some.
    fn usual(frames: &AtomicU64) -> Moved {
        let mut windows = [0; 5].map(|_| Moved::now(frames));
        windows.sort_unstable_by_key(|window| window.frames);
        windows[2]
    }

    /// Whether this is at least six tenths of the rate `before`.
    fn keeps(self, before: Moved) -> bool {
        let [this, that] = [self, before].map(|moved| u128::from(moved.frames));
        10 * this * before.took.as_nanos() >= 6 * that * self.took.as_nanos()
    }
}

/// One of the tries shows at least six tenths of the rate from before in the time right after the
/// ring broke: what harms the neighbour harms it each time.
fn a_neighbour_keeps_its_rate<D: Driver + Send>() {
    let models = [model("victim", 1), model("neighbour", 1)];
    let net = |model| Parts::Net(Arc::clone(model), LinkSpec::Echo);
    let disk = Arc::new(BlkModel::new(BlkSetup {
        name: "disk".into(),
        capacity_bytes: 1 << 20,
        block_size: 512,
        queues: 1,
        rings: RingOptions::default(),
        ..BlkSetup::default()
    }));
    let disk = Parts::Blk(disk, Backing::Ram(Arc::new(Store::new(1 << 20).unwrap())));
    let members = [net(&models[0]), net(&models[1]), disk].map(|parts| Member {
        parts,
        cores: vec![0],
    });
    let options = EngineOptions {
        cores: vec![0],
        // One that slept at times would move few frames, and lose few.
        idle: IdlePolicy::Spin,
        stop_timeout: PATIENCE,
        ..EngineOptions::default()
    };
    let (engine, handles) = Engine::start(&options, members.into()).unwrap();
    let port = |at: usize, model| Port::<D>::new(Arc::clone(&handles[at]), Arc::clone(model));
    // Only rings are asked of the disk, and a port has them.
    let (mut victim, mut disk) = (port(0, &models[0]), port(2, &models[0]));
    let mut neighbour = port(1, &models[1]);
    (0..2).for_each(|index| neighbour.start(index));
    let (frames, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let running = scope.spawn(|| keep_on(&mut neighbour, &frames, &done));
        let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for kind in Victim::all(D::Format::PACKED) {
                let kept = (0..TRIES).any(|_| {
                    let [before, after] = kind.breaks([&mut victim, &mut disk], &frames);
                    after.keeps(before)
                });
                assert!(kept, "{kind:?} slows the neighbour down");
            }
        }));
        done.store(true, Ordering::Relaxed);
        running.join().unwrap();
        broken.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(ring_faults(&victim) > 0 && ring_faults(&disk) > 0);
    assert_eq!(ring_faults(&neighbour), 0);
    for port in [&mut victim, &mut neighbour, &mut disk] {
        for index in port.started.clone() {
            port.stop(index);
        }
    }
    engine.stop();
}

/// One format after the other: each has a worker that never sleeps.
#[test]
fn a_neighbour_keeps_its_rate_while_rings_break() {
    a_neighbour_keeps_its_rate::<SplitDriver>();
    a_neighbour_keeps_its_rate::<PackedDriver>();
}
