//! Queues whose chains are as long as they may be, of descriptors without a byte: nothing is lost
//! or broken, and nobody else waits for more than a little of it in each turn.

use std::sync::Arc;

use vringd::device::blk::{BlkHandler, BlkModel, BlkSetup};
use vringd::device::net::{QueueCounters, Refill, RxHandler, RxWindow, TxHandler, feature};
use vringd::engine::{
    Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringAddr, VringRunner, VringSetup,
};
use vringd::host::net::{DropReason, Frame, FrameBurst, Verdict, VnetHeader};
use vringd::host::null::NullDisk;
use vringd::memory::{GuestRam, Segment, Segments, copy};
use vringd::ring::{ChainId, ChainQueue, Popped, RingFault, RingFormat, Single, Virtqueue};
use vringd::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, UVA, read_guest, write_guest,
};

use crate::support::deadline::wait_until;

use super::neighbour::traffic;
use super::port::{PATIENCE, Port, model, payload};

/// Descriptors after which no other long chain is begun before the next turn.
const WALK_MAX: usize = 16384;
/// Entries of an indirect table, at most, on a ring that is not longer.
const ENTRIES: usize = 1024;
/// Of such chains in a turn.
const IN_A_TURN: usize = WALK_MAX / ENTRIES;
const HEADER: usize = 12;
const FEATURES: u64 = feature::VERSION_1 | feature::MRG_RXBUF;

const BUFFERS: u64 = 0x10_0000;
const TABLE: u64 = 0x8_0000;
const RAM: u64 = 0x40_0000;

/// A ring between a handler and its driver, which counts what is popped in the long way.
struct Rig<D: Driver> {
    ram: Arc<GuestRam>,
    driver: D,
    vq: Counted<Virtqueue<D::Format>>,
}

struct Counted<Q> {
    inner: Q,
    popped: usize,
}

impl<Q: ChainQueue> ChainQueue for Counted<Q> {
    fn pop_singles(&mut self, writable: bool, out: &mut [Single]) -> usize {
        self.inner.pop_singles(writable, out)
    }
    fn put_used_singles(&mut self, singles: &[Single], written: impl Iterator<Item = u32>) {
        self.inner.put_used_singles(singles, written);
    }
    fn pop(&mut self, segments: &mut Segments) -> Result<Popped, RingFault> {
        let popped = self.inner.pop(segments)?;
        self.popped += usize::from(matches!(popped, Popped::Chain(_)));
        Ok(popped)
    }
    fn unpop(&mut self, chain: ChainId) {
        self.inner.unpop(chain);
    }
    fn put_used(&mut self, chain: ChainId, written: u32, writable: &[Segment]) {
        self.inner.put_used(chain, written, writable);
    }
    fn size(&self) -> u16 {
        self.inner.size()
    }
    fn in_flight(&self) -> u32 {
        self.inner.in_flight()
    }
}

impl<D: Driver> Rig<D> {
    fn new(size: u16) -> Rig<D> {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let memory = RingMemory::new::<D::Format>(&ram, 0, size);
        let inner = memory.device::<D::Format>(false);
        Rig {
            driver: D::new(&memory, false),
            vq: Counted { inner, popped: 0 },
            ram,
        }
    }

    /// Chains of a table without a byte, all of the same one.
    fn add_empty(&mut self, count: usize, write: bool) {
        let buf = Buf {
            addr: BUFFERS,
            len: 0,
            write,
        };
        for _ in 0..count {
            self.driver.add_indirect(&[buf; ENTRIES], TABLE).unwrap();
        }
    }

    /// A turn is over; how many chains were popped in it.
    fn publish(&mut self) -> usize {
        self.vq.inner.publish();
        std::mem::take(&mut self.vq.popped)
    }

    fn used(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.driver.used().map(|used| used.1)).collect()
    }
}

fn what_is_sent<D: Driver>() {
    const LONG: usize = 100;
    let mut rig = Rig::<D>::new(128);
    rig.add_empty(LONG, false);
    let sent = [vec![0; HEADER], payload(1, 300)].concat();
    write_guest(&rig.ram, BUFFERS, &sent);
    let bufs: Vec<_> = (0..3)
        .map(|at| Buf::readable(BUFFERS + at * 104, 104))
        .collect();
    rig.driver.add(&bufs).unwrap();
    rig.driver.publish();
    let counters = Arc::new(QueueCounters::default());
    let mut tx = TxHandler::new(FEATURES, 1, Arc::clone(&counters));
    let mut burst = FrameBurst::new();
    let mut seen = 0;
    while seen < LONG {
        let count = tx.receive(&mut rig.vq, &mut burst).unwrap();
        let want = IN_A_TURN.min(LONG + 1 - seen);
        assert_eq!((count, rig.vq.popped), (want, want));
        seen += count;
        if let Some(frame) = burst.frames.iter().find(|f| f.verdict == Verdict::Retry) {
            let mut bytes = vec![0; frame.bytes as usize];
            copy::read(frame.payload(&burst.segments), 0, &mut bytes);
            assert!(bytes == sent[HEADER..], "the frame behind them");
        }
        let sent = |frame: &mut Frame| {
            if frame.verdict == Verdict::Retry {
                frame.verdict = Verdict::Sent;
            }
        };
        burst.frames.iter_mut().for_each(sent);
        tx.complete(&mut rig.vq, &mut burst);
        rig.publish();
    }
    assert_eq!(rig.used(), [0; LONG + 1]);
    assert_eq!(counters.tx.dropped(DropReason::BadChain), LONG as u64);
    assert_eq!((counters.tx.frames(), rig.vq.inner.fault()), (1, None));
}

/// Frames in a burst, of `bytes` bytes each.
fn frames(ram: &GuestRam, count: u64, bytes: usize) -> FrameBurst {
    let mut burst = FrameBurst::new();
    for number in 0..count {
        let at = BUFFERS + 0x20_0000 + number * 2048;
        write_guest(ram, at, &payload(number, bytes));
        let len = u32::try_from(bytes).unwrap();
        let access = vringd::memory::Access::Read;
        ram.translate(at, len, access, &mut burst.segments).unwrap();
        burst.frames.push(Frame {
            header: VnetHeader::PLAIN,
            first: u32::try_from(number).unwrap(),
            count: 1,
            bytes: len,
            verdict: Verdict::Retry,
            cast: vringd::host::net::Cast::Unicast,
        });
    }
    burst
}

/// Every frame comes, though a burst of them takes more descriptors than are walked in a turn.
fn what_is_received<D: Driver>() {
    const FRAMES: u64 = 240;
    const PIECES: u64 = 80;
    let mut rig = Rig::<D>::new(256);
    for number in 0..FRAMES {
        let bufs: Vec<_> = (0..PIECES)
            .map(|piece| Buf::writable(BUFFERS + number * 2048 + piece * 16, 16))
            .collect();
        let table = TABLE + number * 16 * PIECES;
        rig.driver.add_indirect(&bufs, table).unwrap();
    }
    rig.driver.publish();
    let counters = Arc::new(QueueCounters::default());
    let mut rx = RxHandler::new(FEATURES, 256, counters);
    let mut burst = frames(&rig.ram, FRAMES, 1000);
    let mut turns = 0;
    while burst.frames.iter().any(|f| f.verdict == Verdict::Retry) {
        rx.transmit(&mut rig.vq, &mut burst.frames, &burst.segments)
            .unwrap();
        let walked = rig.publish() * usize::try_from(PIECES).unwrap();
        assert!(walked < WALK_MAX + usize::try_from(PIECES).unwrap());
        turns += 1;
    }
    assert_eq!(turns, 2);
    assert!(burst.frames.iter().all(|f| f.verdict == Verdict::Sent));
    assert_eq!(rig.used(), vec![1012; burst.frames.len()]);
    for number in 0..FRAMES {
        let at = BUFFERS + number * 2048 + HEADER as u64;
        assert!(read_guest(&rig.ram, at, 1000) == payload(number, 1000));
    }
}

/// A driver that wants every frame to be looked for in all its chains.
fn what_is_received_by_nobody<D: Driver>() {
    let mut rig = Rig::<D>::new(64);
    rig.add_empty(64, true);
    rig.driver.publish();
    let counters = Arc::new(QueueCounters::default());
    let mut rx = RxHandler::new(FEATURES, 64, counters);
    let mut burst = frames(&rig.ram, 32, 60);
    for frame in &mut burst.frames {
        // What the driver did not acknowledge: each is completed alone.
        frame.header = VnetHeader {
            flags: 1,
            csum_start: 14,
            csum_offset: 16,
            ..VnetHeader::PLAIN
        };
    }
    for _ in 0..3 {
        let (frames, segments) = (&mut burst.frames, &burst.segments);
        rx.transmit(&mut rig.vq, frames, segments).unwrap();
        assert!(rig.publish() <= IN_A_TURN);
        assert_eq!(rig.vq.in_flight(), 0);
    }
    assert_eq!(rig.vq.inner.fault(), None);
}

/// A frame of the host behind a lot of chains without a byte.
fn what_the_host_sends<D: Driver>() {
    const LONG: usize = 40;
    let mut rig = Rig::<D>::new(64);
    // The first has room for a header, and for some of the frame.
    rig.driver
        .add(&[Buf::writable(BUFFERS + 4096, 100)])
        .unwrap();
    rig.add_empty(LONG, true);
    rig.driver.add(&[Buf::writable(BUFFERS, 2048)]).unwrap();
    rig.driver.publish();
    let counters = Arc::new(QueueCounters::default());
    let mut window = RxWindow::new(FEATURES, 64, None, counters);
    assert_eq!(window.refill(&mut rig.vq), Ok(Refill::Ready));
    let frame = payload(7, 700);
    copy::write(window.segments(), 0, &[0; HEADER]);
    copy::write(window.segments(), HEADER, &frame);
    window.commit(&mut rig.vq, HEADER + frame.len());
    assert!(rig.publish() <= IN_A_TURN + 1);
    let mut turns = 1;
    while window.is_pending() {
        let _ = window.refill(&mut rig.vq).unwrap();
        assert!(rig.publish() <= IN_A_TURN);
        turns += 1;
    }
    assert_eq!(turns, 3);
    assert_eq!(rig.used(), [vec![100], vec![0; LONG], vec![612]].concat());
    let front = read_guest(&rig.ram, BUFFERS + 4096 + HEADER as u64, 88);
    let back = read_guest(&rig.ram, BUFFERS, 612);
    assert!([front, back].concat() == frame);
}

fn what_is_asked_of_a_disk<D: Driver>() {
    const LONG: usize = 50;
    let model = BlkModel::new(BlkSetup {
        name: "disk0".into(),
        capacity_bytes: 1 << 20,
        block_size: 512,
        queues: 1,
        ..BlkSetup::default()
    });
    let mut rig = Rig::<D>::new(64);
    // Flushes, of the longest framing and of the usual one.
    write_guest(&rig.ram, BUFFERS, &4u64.to_le_bytes());
    let mut long = [Buf::readable(BUFFERS, 0); ENTRIES];
    long[0] = Buf::readable(BUFFERS, 16);
    long[ENTRIES - 1] = Buf::writable(BUFFERS + 128, 1);
    for _ in 0..LONG {
        rig.driver.add_indirect(&long, TABLE).unwrap();
    }
    let flush = [Buf::readable(BUFFERS, 16), Buf::writable(BUFFERS + 64, 1)];
    rig.driver.add(&flush).unwrap();
    rig.driver.publish();
    write_guest(&rig.ram, BUFFERS + 64, &[0xff]);
    let mut blk = BlkHandler::new(&model, 0, 64, 1 << 9).unwrap();
    let mut scratch = Segments::with_capacity(4096);
    let mut disk = NullDisk::new(64);
    let (mut popped, mut turns) = (0, 0);
    while popped <= LONG {
        blk.poll(&mut rig.vq, &mut disk, &mut scratch, 64).unwrap();
        let now = rig.publish();
        assert!((1..=IN_A_TURN).contains(&now), "{now} of {popped}");
        (popped, turns) = (popped + now, turns + 1);
    }
    assert_eq!(turns, 4);
    assert_eq!(rig.used(), [1; LONG + 1]);
    assert_eq!(read_guest(&rig.ram, BUFFERS + 64, 1), [0]);
    assert_eq!(blk.in_flight(), 0);
}

/// The largest ring, each chain of it the longest: one a turn, while frames of a port beside it
/// come through on the same worker.
fn a_neighbour<D: Driver>() {
    const LARGEST: u16 = 32768;
    let models = [model("attacker", 1), model("neighbour", 1)];
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
    let attacker = Port::<D>::new(Arc::clone(&handles[0]), Arc::clone(&models[0]));
    let mut neighbour = Port::<D>::new(Arc::clone(&handles[1]), Arc::clone(&models[1]));
    (0..2).for_each(|index| neighbour.start(index));
    traffic(&mut neighbour, 0, 1);

    let ram = GuestRam::for_test(&[(0, 2 * RAM)]);
    let receive = RingMemory::new::<D::Format>(&ram, 0, LARGEST);
    let send = RingMemory::new::<D::Format>(&ram, 0x20_0000, LARGEST);
    let mut driver = D::new(&send, false);
    let table = Buf::readable(0x50_0000, 16 * u32::from(LARGEST));
    let entries = D::table(&vec![Buf::readable(0, 0); usize::from(LARGEST)]);
    let bytes: Vec<u8> = entries
        .iter()
        .flatten()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    write_guest(&ram, table.addr, &bytes);
    for _ in 0..LARGEST {
        driver.add_raw(&[(table, 4)]).unwrap();
    }
    driver.publish();
    let packed = u64::from(D::Format::PACKED) << 34;
    let turns = || {
        let counters = engine.counters().remove(0);
        let turns = counters.iter().filter(|(name, _)| name.ends_with("_turns"));
        turns.map(|(_, count)| *count).sum::<u64>()
    };
    for (index, ring) in [receive, send].iter().enumerate() {
        let [desc, driver, device] = ring.at.map(|gpa| gpa + UVA);
        let setup = VringSetup {
            index: u16::try_from(index).unwrap(),
            size: LARGEST,
            features: FEATURES | packed | 1 << 28,
            base: None,
            addr: VringAddr {
                desc,
                driver,
                device,
            },
            ram: Arc::clone(&ram),
            kick: None,
            call: None,
            err: None,
        };
        attacker.handle.start(setup).unwrap();
    }
    let walked = || attacker.counter("tx_drop_bad_chain");
    wait_until("a chain is walked", PATIENCE, || {
        (walked() > 0).then_some(())
    });
    // Each turn of the worker has chains to walk now.
    let (turns_before, chains_before) = (turns(), walked());
    traffic(&mut neighbour, 0, 2);
    let chains = walked() - chains_before;
    let turns = turns() - turns_before;
    // One turn may be under way, and counted only at its end.
    assert!(chains <= turns + 1, "{chains} chains in {turns} turns");
    assert!(walked() < u64::from(LARGEST), "it went on all the time");
    for index in [0, 1] {
        attacker.handle.stop(index).unwrap();
        neighbour.stop(index);
    }
    assert_eq!(neighbour.counter("tx_frames"), 3 * 32);
    engine.stop();
}

macro_rules! both {
    ($($name:ident = $body:ident;)*) => {
        mod split { $(#[test] fn $name() { super::$body::<super::SplitDriver>(); })* }
        mod packed { $(#[test] fn $name() { super::$body::<super::PackedDriver>(); })* }
    };
}

both! {
    long_chains_are_sent_in_turns = what_is_sent;
    long_chains_receive_in_turns = what_is_received;
    chains_without_room_are_looked_at_in_turns = what_is_received_by_nobody;
    frames_of_the_host_come_behind_long_chains = what_the_host_sends;
    requests_come_behind_long_chains = what_is_asked_of_a_disk;
    the_longest_chains_there_can_be_starve_nobody = a_neighbour;
}
