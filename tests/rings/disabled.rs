//! What a guest sends on a vring that is disabled: it gets its buffers back after a while, and each
//! frame is counted. A guest that uses fewer queue pairs than before waits for those of the others.

use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vringd::engine::{Engine, IdlePolicy, LinkSpec, VringRunner};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use crate::support::deadline::wait_until;

use super::losses::{drops, one};
use super::port::{Alone, PATIENCE, SIZE, model, payload, workers_counted};
use super::wire::{ONE_WORKER, TWO_WORKERS, Wire};

/// The other queue pair is not disturbed, and the disabled one goes on as if nothing had been.
fn it_is_given_back_and_counted<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([2, 2], cores);
    wire.start_all();
    let [near, far] = &mut wire.ports;
    for round in 1..=3 {
        near.handle.pause(3, true).unwrap();
        far.post(1, 4);
        for number in 0..u64::from(SIZE) {
            near.send(1, number, &payload(number, 200));
        }
        far.post(0, 4);
        for number in 0..4 {
            let bytes = payload(round + number, 300);
            near.send(0, number, &bytes);
            assert!(far.receive(0, number) == bytes, "{number}");
            near.await_sent(0);
        }
        (0..SIZE).for_each(|_| near.await_sent(1));
        let lost = round * u64::from(SIZE);
        assert_eq!(drops(near, "tx"), one("disabled", lost));
        near.handle.pause(3, false).unwrap();
        for number in 0..4 {
            let bytes = payload(round * number, 400);
            near.send(1, number, &bytes);
            assert!(far.receive(1, number) == bytes, "{number}");
            near.await_sent(1);
        }
        assert_eq!(near.counter("tx_frames"), 8 * round);
        assert_eq!(far.counter("rx_frames"), 8 * round);
    }
    assert_eq!(drops(far, "rx"), []);
}

/// By a worker that sleeps without a bound, since every vring has a kick fd: the time that frames
/// are kept wakes it, and after that a kick.
fn a_worker_that_sleeps_gives_it_back<D: Driver>() {
    let model = model("net0", 1);
    let cores = &[1];
    let mut alone = Alone::<D>::new(model, LinkSpec::Sink, cores, IdlePolicy::Interrupt);
    let port = &mut alone.port;
    port.kick = Some(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
    port.start(0);
    port.start(1);
    port.handle.pause(1, true).unwrap();
    for number in 0..5 {
        port.send(0, number, &payload(number, 100));
    }
    (0..5).for_each(|_| port.await_sent(0));
    assert_eq!(drops(port, "tx"), one("disabled", 5));
    let engine = alone.engine.as_ref().unwrap();
    let slept = |name| workers_counted(engine, name);
    assert!(slept("busy_turns") > 0, "a turn that drops is work");
    let mut before = 0;
    for sent in 6..20 {
        before = wait_until("it sleeps again", PATIENCE, || {
            Some(slept("parks")).filter(|&parks| parks > before)
        });
        port.send(0, 0, &payload(sent, 100));
        port.await_sent(0);
        assert_eq!(drops(port, "tx"), one("disabled", sent));
    }
    assert_eq!(slept("bounded_parks"), 0);
    port.handle.pause(1, false).unwrap();
    port.send(0, 0, &payload(0, 100));
    port.await_sent(0);
    assert_eq!(port.counter("tx_drop_sink"), 1);
    assert_eq!(port.counter("tx_drop_disabled"), 19);
    port.stop(1);
    port.stop(0);
}

/// A port whose guest has sent five frames, and whose worker sleeps as there are no buffers.
fn waits_for_buffers<D: Driver>() -> Alone<D> {
    let mut alone = Alone::<D>::echo(1, &[1], IdlePolicy::Interrupt);
    let port = &mut alone.port;
    port.kick = Some(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
    port.start(0);
    port.start(1);
    port.send_burst(0, 5, |number| payload(number, 100));
    let engine = alone.engine.as_ref().unwrap();
    wait_until("it waits for buffers", PATIENCE, || {
        (workers_counted(engine, "parks") > 0).then_some(())
    });
    alone
}

/// Frames waited for buffers when their vring was disabled, and then there are some: nothing is to
/// be done, and the worker sleeps until it is told of something.
fn a_worker_sleeps_though_frames_waited<D: Driver>() {
    let mut alone = waits_for_buffers::<D>();
    let (port, engine) = (&mut alone.port, alone.engine.as_ref().unwrap());
    port.handle.pause(1, true).unwrap();
    port.post(0, 1);
    (0..5).for_each(|_| port.await_sent(0));
    assert_eq!(drops(port, "tx"), one("disabled", 5));
    it_sleeps_on(engine);
    port.stop(1);
    port.stop(0);
}

/// No turns at all: who looks and finds nothing again and again counts no sleeps either.
fn it_sleeps_on(engine: &Engine) {
    wait_until("it sleeps on", PATIENCE, || {
        let counted = || ["parks", "empty_turns"].map(|name| workers_counted(engine, name));
        let before = counted();
        std::thread::sleep(Duration::from_millis(20));
        (counted() == before).then_some(())
    });
}

/// The same, and their vring is stopped.
fn a_worker_sleeps_though_its_guest_sends_no_more<D: Driver>() {
    let mut alone = waits_for_buffers::<D>();
    let (port, engine) = (&mut alone.port, alone.engine.as_ref().unwrap());
    port.stop(1);
    port.post(0, 1);
    it_sleeps_on(engine);
    port.stop(0);
}

#[test]
fn a_worker_sleeps_though_its_guest_sends_no_more_split() {
    a_worker_sleeps_though_its_guest_sends_no_more::<SplitDriver>();
}

#[test]
fn a_worker_sleeps_though_its_guest_sends_no_more_packed() {
    a_worker_sleeps_though_its_guest_sends_no_more::<PackedDriver>();
}

#[test]
fn a_worker_sleeps_though_frames_waited_split() {
    a_worker_sleeps_though_frames_waited::<SplitDriver>();
}

#[test]
fn a_worker_sleeps_though_frames_waited_packed() {
    a_worker_sleeps_though_frames_waited::<PackedDriver>();
}

#[test]
fn it_is_given_back_and_counted_on_one_worker() {
    it_is_given_back_and_counted::<SplitDriver>(ONE_WORKER);
    it_is_given_back_and_counted::<PackedDriver>(ONE_WORKER);
}

#[test]
fn it_is_given_back_and_counted_on_two_workers() {
    it_is_given_back_and_counted::<SplitDriver>(TWO_WORKERS);
    it_is_given_back_and_counted::<PackedDriver>(TWO_WORKERS);
}

#[test]
fn a_worker_that_sleeps_gives_it_back_split() {
    a_worker_that_sleeps_gives_it_back::<SplitDriver>();
}

#[test]
fn a_worker_that_sleeps_gives_it_back_packed() {
    a_worker_that_sleeps_gives_it_back::<PackedDriver>();
}
