//! Bursts on a wire of which not every frame arrives: each is delivered once or counted as dropped,
//! wherever in its burst it is, and its buffer comes back in its turn.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vringd::engine::{IdlePolicy, LinkSpec};
use vringd::host::limit::Rates;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, read_guest, write_guest};

use crate::support::deadline::wait_until;

use super::port::{Alone, PATIENCE, Port, SIZE, model, payload};
use super::wire::{ONE_WORKER, TWO_WORKERS, Wire};

const HEADER: u32 = 12;
const BUFFER: u32 = 2048;
/// Nothing is dropped for want of buffers.
const FOR_EVER: Duration = Duration::from_secs(60);

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Good,
    /// A header and nothing else: `bad_chain`.
    Empty,
    /// Longer than any frame: `too_big`.
    Long,
}

/// The bytes of a good frame: no two of some hundred in a row are equally long.
fn bytes_of(number: u64) -> Vec<u8> {
    payload(number, 60 + usize::try_from(number * 37 % 1400).unwrap())
}

/// The sending driver's side: buffers come back in the order in which they were offered.
#[derive(Default)]
struct Sender {
    ids: VecDeque<u16>,
    next: u64,
}

impl Sender {
    /// Offers these frames, all at once.
    fn offer<D: Driver>(&mut self, port: &mut Port<D>, kinds: &[Kind]) {
        for &kind in kinds {
            let at = Port::<D>::buffer(1, self.next % u64::from(SIZE));
            let bytes = bytes_of(self.next);
            write_guest(&port.ram, at, &[0; HEADER as usize]);
            write_guest(&port.ram, at + u64::from(HEADER), &bytes);
            let len = match kind {
                Kind::Good => HEADER + u32::try_from(bytes.len()).unwrap(),
                Kind::Empty => HEADER,
                Kind::Long => 70_000,
            };
            let id = port.drivers[1].add(&[Buf::readable(at, len)]);
            self.ids.push_back(id.expect("room in the ring"));
            self.next += 1;
        }
        port.drivers[1].publish();
    }

    /// Takes a buffer back, if one is there.
    fn take_back<D: Driver>(&mut self, port: &mut Port<D>) -> bool {
        let Some((id, _)) = port.drivers[1].used() else {
            return false;
        };
        assert_eq!(Some(id), self.ids.pop_front(), "each once, and in order");
        true
    }

    fn take_all_back<D: Driver>(&mut self, port: &mut Port<D>) {
        wait_until("all buffers are given back", PATIENCE, || {
            while self.take_back(port) {}
            self.ids.is_empty().then_some(())
        });
    }
}

/// The receiving driver's side.
#[derive(Default)]
struct Receiver {
    posted: u64,
    received: u64,
}

impl Receiver {
    fn post<D: Driver>(&mut self, port: &mut Port<D>, count: u64) {
        for _ in 0..count {
            let at = Port::<D>::buffer(0, self.posted % u64::from(SIZE));
            let id = port.drivers[0].add(&[Buf::writable(at, BUFFER)]);
            id.expect("room in the ring");
            self.posted += 1;
        }
        port.drivers[0].publish();
    }

    fn poll<D: Driver>(&mut self, port: &mut Port<D>) -> Option<Vec<u8>> {
        let (_, len) = port.drivers[0].used()?;
        let at = Port::<D>::buffer(0, self.received % u64::from(SIZE));
        self.received += 1;
        let len = (len - HEADER) as usize;
        Some(read_guest(&port.ram, at + u64::from(HEADER), len))
    }

    fn receive<D: Driver>(&mut self, port: &mut Port<D>) -> Vec<u8> {
        wait_until("a frame", PATIENCE, || self.poll(port))
    }
}

/// Every frame that was offered is in a counter of its sender, and what it says was sent came.
fn balance<D: Driver>(wire: &Wire<D>, offered: u64, received: u64) {
    let all = vringd::device::DeviceModel::counters(wire.ports[0].model.as_ref());
    let drops = all.iter().filter(|(name, _)| name.starts_with("tx_drop_"));
    let dropped: u64 = drops.map(|(_, count)| count).sum();
    assert_eq!(
        wire.ports[0].counter("tx_frames") + dropped,
        offered,
        "{all:?}"
    );
    assert_eq!(wire.ports[0].counter("tx_frames"), received, "{all:?}");
    assert_eq!(wire.ports[1].counter("rx_frames"), received);
}

/// Bad frames at the front, in the middle and at the end: every burst of up to four frames.
fn bad_frames_anywhere<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::with_hold([1, 1], cores, FOR_EVER);
    wire.start_all();
    let [from, to] = &mut wire.ports;
    let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
    let mut bad = [0, 0];
    for len in 1..=4 {
        for pattern in 0..1 << len {
            let kinds: Vec<_> = (0..len)
                .map(|at| match (pattern >> at & 1, at % 2) {
                    (0, _) => Kind::Good,
                    (_, 0) => Kind::Empty,
                    _ => Kind::Long,
                })
                .collect();
            let first = sender.next;
            for (count, kind) in bad.iter_mut().zip([Kind::Empty, Kind::Long]) {
                *count += kinds.iter().filter(|&&other| other == kind).count() as u64;
            }
            let good = (first..).zip(&kinds).filter(|(_, k)| **k == Kind::Good);
            let good: Vec<u64> = good.map(|(number, _)| number).collect();
            receiver.post(to, good.len() as u64);
            sender.offer(from, &kinds);
            sender.take_all_back(from);
            for number in good {
                assert!(receiver.receive(to) == bytes_of(number), "{kinds:?}");
            }
            let counted = ["tx_drop_bad_chain", "tx_drop_too_big"].map(|n| from.counter(n));
            assert_eq!(counted, bad, "{kinds:?}");
        }
    }
    let (offered, received) = (sender.next, receiver.received);
    assert!(!sender.take_back(from) && receiver.poll(to).is_none());
    balance(&wire, offered, received);
}

/// Bad frames among many, in bursts of any length, with several bursts under way.
fn bad_frames_in_a_stream<D: Driver>(cores: [usize; 2]) {
    const FRAMES: u64 = 4000;
    let kind = |number: u64| match number.wrapping_mul(0x9e37_79b9) >> 7 & 7 {
        0 | 1 => Kind::Empty,
        2 => Kind::Long,
        _ => Kind::Good,
    };
    let mut wire = Wire::<D>::with_hold([1, 1], cores, FOR_EVER);
    wire.start_all();
    let [from, to] = &mut wire.ports;
    let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
    // Fewer than the sender has under way: now and then frames wait.
    receiver.post(to, 24);
    let mut expected = (0..FRAMES).filter(|&number| kind(number) == Kind::Good);
    let good = expected.clone().count() as u64;
    let deadline = Instant::now() + PATIENCE;
    while receiver.received < good || sender.next < FRAMES || !sender.ids.is_empty() {
        assert!(Instant::now() < deadline, "{} came", receiver.received);
        let room = usize::from(SIZE) - sender.ids.len();
        let burst = usize::try_from(1 + sender.next % 23).unwrap().min(room);
        let end = FRAMES.min(sender.next + burst as u64);
        let kinds: Vec<_> = (sender.next..end).map(kind).collect();
        sender.offer(from, &kinds);
        while sender.take_back(from) {}
        while let Some(frame) = receiver.poll(to) {
            let number = expected.next().expect("no frame comes twice");
            assert!(frame == bytes_of(number), "frame {number}");
            receiver.post(to, 1);
        }
        std::thread::yield_now();
    }
    assert!(!sender.take_back(from) && receiver.poll(to).is_none());
    balance(&wire, FRAMES, good);
}

fn a_frame_now_and_then() -> Rates {
    Rates {
        count: Some(2000),
        size: None,
        burst: Duration::from_millis(10),
    }
}

/// A limit drops the end of a burst and nothing else, whoever's limit it is.
fn limits<D: Driver>(cores: [usize; 2]) {
    for egress in [false, true] {
        let mut wire = Wire::<D>::with_hold([1, 1], cores, FOR_EVER);
        let limits = wire.ports[usize::from(egress)].model.limits();
        let limit = [&limits.ingress, &limits.egress][usize::from(egress)];
        limit.set(a_frame_now_and_then());
        wire.start_all();
        let [from, to] = &mut wire.ports;
        let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
        receiver.post(to, 48);
        for _ in 0..20 {
            let mut next = sender.next;
            sender.offer(from, &[Kind::Good; 48]);
            sender.take_all_back(from);
            let sent = from.counter("tx_frames");
            while receiver.received < sent {
                let frame = receiver.receive(to);
                // In order, each at most once.
                let later = (next..sender.next).find(|&number| frame == bytes_of(number));
                next = later.expect("a frame of this burst") + 1;
                receiver.post(to, 1);
            }
        }
        let dropped = [from, to].map(|port| port.counter("tx_drop_policed"));
        assert!(dropped[0] > 0 && dropped[1] == 0, "{dropped:?}");
        assert!(receiver.received > 0);
        let there = wire.ports[1].counter("rx_drop_policed");
        assert_eq!(there, if egress { dropped[0] } else { 0 });
        balance(&wire, sender.next, receiver.received);
    }
}

/// What is dropped behind a frame that waits does not make it wait for ever, nor is it counted
/// again and again.
fn drops_behind_a_frame_that_waits<D: Driver>(cores: [usize; 2]) {
    let one = Rates {
        count: Some(1),
        size: None,
        burst: Duration::from_millis(10),
    };
    for (ingress, egress, last) in [
        (Rates::default(), Rates::default(), Kind::Empty),
        (one, Rates::default(), Kind::Good),
        (Rates::default(), one, Kind::Good),
        (one, one, Kind::Long),
    ] {
        let mut wire = Wire::<D>::new([1, 1], cores);
        wire.ports[0].model.limits().ingress.set(ingress);
        wire.ports[1].model.limits().egress.set(egress);
        wire.start_all();
        let mut sender = Sender::default();
        sender.offer(&mut wire.ports[0], &[Kind::Good, Kind::Good, last]);
        sender.take_all_back(&mut wire.ports[0]);
        balance(&wire, 3, 0);
        assert!(wire.ports[0].counter("tx_drop_peer_full") > 0);
        let bad = ["tx_drop_bad_chain", "tx_drop_too_big"].map(|name| wire.ports[0].counter(name));
        assert_eq!(
            bad.map(|count| count > 0),
            [last == Kind::Empty, last == Kind::Long]
        );
        let policed = wire.ports[1].counter("rx_drop_policed");
        assert!(policed <= wire.ports[0].counter("tx_drop_policed"));
    }
}

/// A receiver that posts a buffer for each frame late, but in time, loses nothing, even when all
/// of it takes longer than a frame may wait.
fn a_slow_receiver<D: Driver>(cores: [usize; 2]) {
    const LATE: Duration = Duration::from_millis(400);
    let kinds = [Kind::Good; 4];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut wire = Wire::<D>::with_hold([1, 1], cores, LATE);
        wire.start_all();
        let [from, to] = &mut wire.ports;
        let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
        sender.offer(from, &kinds);
        let (start, mut latest) = (Instant::now(), Duration::ZERO);
        for number in 0..kinds.len() as u64 {
            let since = Instant::now();
            // The pace, which is what is tested.
            std::thread::sleep(LATE / 2);
            receiver.post(to, 1);
            latest = latest.max(since.elapsed());
            if latest < LATE * 3 / 4 {
                assert!(receiver.receive(to) == bytes_of(number), "frame {number}");
                latest = latest.max(since.elapsed());
            }
        }
        if latest >= LATE * 3 / 4 {
            // We were too late ourselves: the machine is busy.
            assert!(Instant::now() < deadline, "no time to test this");
            continue;
        }
        assert!(start.elapsed() > LATE);
        sender.take_all_back(from);
        return balance(&wire, kinds.len() as u64, kinds.len() as u64);
    }
}

macro_rules! wires {
    ($($name:ident)*) => {
        mod one_worker_split {
            $(#[test] fn $name() { super::$name::<super::SplitDriver>(super::ONE_WORKER); })*
        }
        mod one_worker_packed {
            $(#[test] fn $name() { super::$name::<super::PackedDriver>(super::ONE_WORKER); })*
        }
        mod two_workers_split {
            $(#[test] fn $name() { super::$name::<super::SplitDriver>(super::TWO_WORKERS); })*
        }
        mod two_workers_packed {
            $(#[test] fn $name() { super::$name::<super::PackedDriver>(super::TWO_WORKERS); })*
        }
    };
}

wires! {
    bad_frames_anywhere
    bad_frames_in_a_stream
    limits
    drops_behind_a_frame_that_waits
    a_slow_receiver
}

/// A port that gets back what it sends, without buffers to get it in: what is dropped behind the
/// frame that waits does not keep the worker awake, nor is it counted again and again.
fn an_echo_without_buffers<D: Driver>() {
    let model = model("net0", 1);
    model.limits().egress.set(Rates {
        count: Some(1),
        size: None,
        burst: Duration::from_millis(10),
    });
    let mut alone = Alone::<D>::new(model, LinkSpec::Echo, &[0], IdlePolicy::Interrupt);
    let (engine, port) = (alone.engine.as_ref().unwrap(), &mut alone.port);
    let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
    (0..2).for_each(|index| port.start(index));
    sender.offer(port, &[Kind::Good, Kind::Good, Kind::Empty]);
    let parks = || {
        let counters = engine.counters().remove(0);
        let parks = counters.iter().filter(|(name, _)| name.ends_with("parks"));
        parks.map(|(_, count)| count).sum::<u64>()
    };
    let before = parks();
    wait_until("the worker sleeps", PATIENCE, || {
        (parks() > before + 20).then_some(())
    });
    assert_eq!(port.counter("rx_drop_policed"), 0, "nothing is decided yet");
    receiver.post(port, 2);
    assert!(receiver.receive(port) == bytes_of(0));
    sender.take_all_back(port);
    let counted = ["tx_frames", "tx_drop_policed", "rx_drop_policed"].map(|n| port.counter(n));
    assert_eq!(counted, [1, 1, 1]);
    assert_eq!(port.counter("tx_drop_bad_chain"), 1);
    (0..2).for_each(|index| {
        port.stop(index);
    });
}

#[test]
fn an_echo_without_buffers_lets_the_worker_sleep() {
    an_echo_without_buffers::<SplitDriver>();
    an_echo_without_buffers::<PackedDriver>();
}
