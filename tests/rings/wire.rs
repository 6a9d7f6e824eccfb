//! Two ports on a wire, each with a guest of its own, served by one worker or by two.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vringd::device::DeviceModel;
use vringd::engine::{Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringRunner};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use crate::support::deadline::wait_until;

use super::losses::drops;
use super::port::{PATIENCE, Port, SIZE, fresh, model, payload, workers_counted};

const HOLD: Duration = Duration::from_millis(2);

/// Two ports on a wire.
pub(super) struct Wire<D: Driver> {
    engine: Option<Engine>,
    pub(super) ports: [Port<D>; 2],
}

impl<D: Driver> Wire<D> {
    /// With so many queue pairs each, served by the workers of these cores.
    pub(super) fn new(pairs: [u16; 2], cores: [usize; 2]) -> Wire<D> {
        Wire::with_hold(pairs, cores, HOLD)
    }

    /// Whose frames wait for so long.
    pub(super) fn with_hold(pairs: [u16; 2], cores: [usize; 2], hold: Duration) -> Wire<D> {
        Wire::served_by(pairs, cores.map(|core| vec![core]), hold)
    }

    /// Whose ports are served by the workers of several cores.
    pub(super) fn served_by(pairs: [u16; 2], cores: [Vec<usize>; 2], hold: Duration) -> Wire<D> {
        let models = [0, 1].map(|port| model(&format!("net{port}"), pairs[port]));
        let member = |port: usize| Member {
            parts: Parts::Net(
                Arc::clone(&models[port]),
                LinkSpec::Wire {
                    peer: 1 - port,
                    hold,
                },
            ),
            cores: cores[port].clone(),
        };
        let mut all = cores.concat();
        all.sort_unstable();
        all.dedup();
        let options = EngineOptions {
            cores: all,
            idle: IdlePolicy::Adaptive,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let (engine, handles) = Engine::start(&options, vec![member(0), member(1)]).unwrap();
        let port = |at: usize| Port::new(Arc::clone(&handles[at]), Arc::clone(&models[at]));
        Wire {
            engine: Some(engine),
            ports: [port(0), port(1)],
        }
    }

    pub(super) fn start_all(&mut self) {
        for port in &mut self.ports {
            (0..port.model.vrings_max()).for_each(|index| port.start(index));
        }
    }
}

impl<D: Driver> Drop for Wire<D> {
    fn drop(&mut self) {
        for port in &mut self.ports {
            for index in port.started.drain(..) {
                let _ = port.handle.stop(index);
            }
        }
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

pub(super) const ONE_WORKER: [usize; 2] = [0, 0];
pub(super) const TWO_WORKERS: [usize; 2] = [0, 1];

/// Every byte arrives, in order, both ways, lap after lap.
fn frames_cross<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    wire.start_all();
    for lap in 0..40 {
        let count = 1 + lap % u64::from(SIZE);
        for (from, to) in [(0, 1), (1, 0)] {
            wire.ports[to].post(0, count);
            for number in 0..count {
                let bytes = 60 + usize::try_from((lap * 131 + number * 17) % 1455).unwrap();
                wire.ports[from].send(0, number, &payload(lap * 64 + number, bytes));
            }
            for number in 0..count {
                let bytes = 60 + usize::try_from((lap * 131 + number * 17) % 1455).unwrap();
                let got = wire.ports[to].receive(0, number);
                assert!(
                    got == payload(lap * 64 + number, bytes),
                    "lap {lap}, frame {number}"
                );
            }
            (0..count).for_each(|_| wire.ports[from].await_sent(0));
        }
    }
    for port in &wire.ports {
        assert_eq!(port.counter("tx_frames"), port.counter("rx_frames"));
    }
}

/// A receiver without buffers costs its sender a short wait and then frames, counted as such. (What
/// one costs that is only late is in `drops`.)
fn a_full_receiver<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    wire.start_all();
    let start = Instant::now();
    for number in 0..8 {
        wire.ports[0].send(0, number, &payload(number, 100));
    }
    (0..8).for_each(|_| wire.ports[0].await_sent(0));
    let waited = start.elapsed();
    assert!(waited >= HOLD, "they waited");
    // Eight holds, and what a busy machine adds.
    assert!(waited < PATIENCE / 2, "and not for ever: {waited:?}");
    assert_eq!(wire.ports[0].counter("tx_drop_peer_full"), 8);
    // And the wire works on.
    wire.ports[1].post(0, 1);
    wire.ports[0].send(0, 0, &payload(9, 100));
    assert_eq!(wire.ports[1].receive(0, 0), payload(9, 100));
}

/// Nobody at the other end: frames are lost at once and counted.
fn an_absent_receiver<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    wire.ports[0].start(1);
    wire.ports[0].send(0, 0, &payload(1, 64));
    wire.ports[0].await_sent(0);
    assert_eq!(wire.ports[0].counter("tx_drop_peer_down"), 1);
    // It comes, it is disabled, it comes again, it goes.
    wire.ports[1].start(0);
    wire.ports[1].post(0, 2);
    wire.ports[0].send(0, 1, &payload(2, 64));
    assert_eq!(wire.ports[1].receive(0, 0), payload(2, 64));
    wire.ports[1].handle.pause(0, true).unwrap();
    wire.ports[0].await_sent(0);
    wire.ports[0].send(0, 2, &payload(3, 64));
    wire.ports[0].await_sent(0);
    assert_eq!(wire.ports[0].counter("tx_drop_peer_down"), 2);
    wire.ports[1].handle.pause(0, false).unwrap();
    wire.ports[0].send(0, 3, &payload(4, 64));
    assert_eq!(wire.ports[1].receive(0, 1), payload(4, 64));
    wire.ports[0].await_sent(0);
    wire.ports[1].stop(0);
    wire.ports[0].send(0, 4, &payload(5, 64));
    wire.ports[0].await_sent(0);
    assert_eq!(wire.ports[0].counter("tx_drop_peer_down"), 3);
}

/// What is sent before the other end has come waits for it, in order and whole, if it comes soon.
fn who_comes_first_waits<D: Driver>(cores: [usize; 2]) {
    // Nothing is given up for want of buffers, which come later.
    let mut wire = Wire::<D>::with_hold([1, 1], cores, Duration::from_secs(60));
    for (first, second) in [(0, 1), (1, 0)] {
        let engine = wire.engine.as_ref().unwrap();
        let turns = || workers_counted(engine, "empty_turns");
        let [a, b] = &mut wire.ports;
        let (early, late) = if first < second { (a, b) } else { (b, a) };
        early.start(1);
        let count = u64::from(SIZE);
        for number in 0..count {
            early.send(0, number, &payload(number, 200));
        }
        let before = turns();
        wait_until("the workers look at it", PATIENCE, || {
            (turns() > before + 10).then_some(())
        });
        late.start(0);
        late.post(0, count);
        for number in 0..count {
            assert!(late.receive(0, number) == payload(number, 200), "{number}");
            early.await_sent(0);
        }
        assert_eq!(drops(early, "tx"), []);
        assert_eq!(drops(late, "rx"), []);
        early.stop(1);
        late.stop(0);
    }
}

/// Four pairs against one, and pairs that stop under way: what is sent on any pair arrives.
fn uneven_pairs<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([4, 1], cores);
    wire.start_all();
    wire.ports[1].post(0, 4);
    for pair in 0..4 {
        wire.ports[0].send(pair, 0, &payload(u64::from(pair), 200));
        let got = wire.ports[1].receive(0, u64::from(pair));
        assert_eq!(got, payload(u64::from(pair), 200));
        wire.ports[0].await_sent(pair);
    }
    // The other way round all comes on the first pair, and on another once that has stopped.
    wire.ports[0].post(0, 1);
    wire.ports[0].post(1, 1);
    wire.ports[1].send(0, 0, &payload(50, 90));
    assert_eq!(wire.ports[0].receive(0, 0), payload(50, 90));
    wire.ports[0].handle.pause(0, true).unwrap();
    wire.ports[1].await_sent(0);
    wire.ports[1].send(0, 1, &payload(51, 90));
    assert_eq!(wire.ports[0].receive(1, 0), payload(51, 90));
}

/// A sender stops while its frames wait for a receiver: it gets all its buffers back first.
fn a_stop_under_way<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    for round in 0..20 {
        wire.start_all();
        for number in 0..16 {
            wire.ports[0].send(0, number, &payload(number, 64));
        }
        let base = wire.ports[0].stop(1);
        let driver = &mut wire.ports[0].drivers[1];
        let back = core::iter::from_fn(|| driver.used()).count();
        // What it took is what came back; the wrap counter is in the top bit.
        assert_eq!(base as usize & 0x7fff, back, "round {round}");
        for port in &mut wire.ports {
            for index in port.started.clone() {
                port.stop(index);
            }
            // A new session: new rings.
            port.drivers = port.rings.iter().map(fresh).collect();
        }
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
    frames_cross
    a_full_receiver
    an_absent_receiver
    who_comes_first_waits
    uneven_pairs
    a_stop_under_way
}
