//! Calls that an operator has put off (`call_max_used`, `call_max_us`): as few as the settings say,
//! and none is lost, neither to sleep nor to a stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vringd::device::blk::BlkSetup;
use vringd::device::net::{LinkInfo, NetModel, NetOptions, Offloads};
use vringd::device::{CallLimits, RingOptions};
use vringd::engine::{
    Backing, Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringRunner,
};
use vringd::memory::Store;
use vringd::testing::driver::{Calls, Driver, PackedDriver, SplitDriver};

use crate::support::deadline::wait_until;

use super::engine::{DISK, Fds, Machine, eventfd};
use super::port::{PATIENCE, Port, payload};

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// Longer than any test runs, more than it sends.
const NEVER: CallLimits = CallLimits {
    used: 1 << 20,
    wait: Duration::from_secs(3600),
};

/// An echo port of one pair, with the call fds of its vrings.
struct Called<D: Driver> {
    engine: Option<Engine>,
    port: Port<D>,
    calls: [EventFd; 2],
    event_idx: bool,
}

impl<D: Driver> Called<D> {
    fn new(limits: CallLimits, idle: IdlePolicy, event_idx: bool) -> Called<D> {
        let model = Arc::new(NetModel::new(NetOptions {
            name: "net0".to_owned(),
            queue_pairs: 1,
            mac: None,
            mtu: None,
            offloads: Offloads::CSUM_TSO,
            link: LinkInfo::default(),
            rings: RingOptions {
                calls: Some(limits),
                ..RingOptions::default()
            },
        }));
        let options = EngineOptions {
            cores: vec![0],
            idle,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let member = Member {
            parts: Parts::Net(Arc::clone(&model), LinkSpec::Echo),
            cores: vec![0],
        };
        let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
        let mut port = Port::<D>::new(handles.remove(0), model);
        port.drivers = (port.rings.iter().map(|ring| D::new(ring, event_idx))).collect();
        let calls = [eventfd(), eventfd()];
        for (index, call) in (0..).zip(&calls) {
            port.start_with(index, if event_idx { EVENT_IDX } else { 0 }, None);
            let call = Some(call.try_clone().unwrap());
            port.handle.set_call(index, call, None).unwrap();
        }
        // Whoever is given a call fd is called once, for what it may have missed before.
        assert_eq!(calls.each_ref().map(|call| call.read().ok()), [Some(1); 2]);
        Called {
            engine: Some(engine),
            port,
            calls,
            event_idx,
        }
    }

    /// Asks for a call once `n` more buffers than the next one were used.
    fn ask(&mut self, n: u16) {
        let calls = if self.event_idx {
            Calls::After(n)
        } else {
            Calls::On
        };
        let drivers = self.port.drivers.iter_mut();
        drivers.for_each(|driver| driver.set_calls(calls));
    }

    /// A frame there and back, one used buffer in each ring.
    fn frame(&mut self, number: u64) {
        let sent = payload(number, 60 + usize::try_from(number).unwrap());
        self.port.post(0, 1);
        self.port.send(0, 0, &sent);
        assert_eq!(self.port.receive(0, 0), sent);
        self.port.await_sent(0);
    }

    /// Waits until both vrings called, each once.
    fn await_calls(&self) {
        for call in &self.calls {
            let count = wait_until("the driver is called", PATIENCE, || call.read().ok());
            assert_eq!(count, 1);
        }
    }

    #[track_caller]
    fn no_call(&self) {
        let calls = self.calls.each_ref().map(|call| call.read().ok());
        assert_eq!(calls, [None; 2]);
    }

    /// Stops both, which call their drivers `last` times then, and counts the calls of all time.
    fn stop(&mut self, last: Option<u64>) -> u64 {
        for index in [1, 0] {
            self.port.stop(index);
        }
        let calls = self.calls.each_ref().map(|call| call.read().ok());
        assert_eq!(calls, [last; 2]);
        let counters = self.port.handle.counters();
        counters
            .iter()
            .find(|(name, _)| *name == "calls")
            .unwrap()
            .1
    }
}

impl<D: Driver> Drop for Called<D> {
    fn drop(&mut self) {
        for index in self.port.started.drain(..) {
            let _ = self.port.handle.stop(index);
        }
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

/// One call for every four buffers, and one at the end for the two that are left.
fn a_call_tells_of_so_many_buffers<D: Driver>() {
    for event_idx in [false, true] {
        let limits = CallLimits { used: 4, ..NEVER };
        let mut called = Called::<D>::new(limits, IdlePolicy::Spin, event_idx);
        for number in 1..=10 {
            called.ask(0);
            called.frame(number);
            if number % 4 == 0 {
                called.await_calls();
            } else {
                called.no_call();
            }
        }
        assert_eq!(called.stop(Some(1)), 2 * (1 + 3), "event idx: {event_idx}");
    }
}

/// The sixth buffer is the one that the driver wants to hear of, and the first that counts.
fn buffers_nobody_asked_for_count_once_a_call_is_owed<D: Driver>() {
    let limits = CallLimits { used: 4, ..NEVER };
    let mut called = Called::<D>::new(limits, IdlePolicy::Spin, true);
    called.ask(5);
    for number in 1..=8 {
        called.frame(number);
        called.no_call();
    }
    called.frame(9);
    called.await_calls();
    called.frame(10);
    assert_eq!(called.stop(None), 2 * (1 + 1));
}

/// The worker never sleeps, so that nothing but the time brings the call.
fn a_call_comes_when_its_time_is_up<D: Driver>() {
    for event_idx in [false, true] {
        let wait = Duration::from_millis(20);
        let limits = CallLimits { wait, ..NEVER };
        let mut called = Called::<D>::new(limits, IdlePolicy::Spin, event_idx);
        for number in 1..=3 {
            called.ask(0);
            let start = Instant::now();
            called.frame(number);
            called.await_calls();
            assert!(start.elapsed() >= wait, "{:?}", start.elapsed());
        }
        assert_eq!(called.stop(None), 2 * (1 + 3));
    }
}

/// Nobody keeps time while the worker sleeps: it calls before.
fn a_call_is_made_before_sleep<D: Driver>() {
    for idle in [IdlePolicy::Interrupt, IdlePolicy::Adaptive] {
        let mut called = Called::<D>::new(NEVER, idle, false);
        for number in 1..=5 {
            called.ask(0);
            called.frame(number);
            called.await_calls();
        }
        assert_eq!(called.stop(None), 2 * (1 + 5));
    }
}

fn a_stop_makes_the_call_that_is_owed_and_no_other<D: Driver>() {
    let mut called = Called::<D>::new(NEVER, IdlePolicy::Spin, false);
    (1..=3).for_each(|number| called.frame(number));
    called.no_call();
    assert_eq!(called.stop(Some(1)), 2 * (1 + 1));
    let mut silent = Called::<D>::new(NEVER, IdlePolicy::Spin, false);
    let drivers = silent.port.drivers.iter_mut();
    drivers.for_each(|driver| driver.set_calls(Calls::Off));
    (1..=3).for_each(|number| silent.frame(number));
    assert_eq!(silent.stop(None), 2);
}

fn a_disk_calls_before_sleep<D: Driver>() {
    let store = Arc::new(Store::new(DISK).unwrap());
    let setup = BlkSetup {
        rings: RingOptions {
            calls: Some(NEVER),
            ..RingOptions::default()
        },
        ..BlkSetup::default()
    };
    let mut machine = Machine::<D>::with(vec![0], Backing::Ram(store), setup);
    let (kick, call) = (eventfd(), eventfd());
    machine.start(
        0,
        &Fds {
            kick: Some(&kick),
            call: Some(&call),
            err: None,
        },
    );
    for number in 0..5 {
        let id = machine.post(0, number, false);
        kick.write(1).unwrap();
        assert_eq!(machine.await_used(0), (id, 513));
        let count = wait_until("the driver is called", PATIENCE, || call.read().ok());
        assert_eq!(count, 1);
    }
}

macro_rules! both {
    ($($name:ident)*) => {
        mod split { $(#[test] fn $name() { super::$name::<super::SplitDriver>(); })* }
        mod packed { $(#[test] fn $name() { super::$name::<super::PackedDriver>(); })* }
    };
}

both! {
    a_call_tells_of_so_many_buffers
    buffers_nobody_asked_for_count_once_a_call_is_owed
    a_call_comes_when_its_time_is_up
    a_call_is_made_before_sleep
    a_stop_makes_the_call_that_is_owed_and_no_other
    a_disk_calls_before_sleep
}
