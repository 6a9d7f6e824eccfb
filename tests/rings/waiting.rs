//! Frames that wait on a wire when one of its ports goes away: each of them is counted with the
//! reason, and none of them arrives.

use std::time::Duration;

use vringd::engine::VringRunner;
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::losses::{drops, one};
use super::port::{Port, payload};
use super::wire::{ONE_WORKER, TWO_WORKERS, Wire};

/// Nothing is given up for want of buffers.
const FOR_EVER: Duration = Duration::from_secs(60);
/// Frames that are sent, and how many of them the receiver has buffers for.
const SENT: u64 = 40;
const TAKEN: u64 = 3;

/// A way in which a port's receive vring stops to take frames.
type Goes<D> = fn(&mut Port<D>, u16);

fn stops<D: Driver>(port: &mut Port<D>, index: u16) {
    port.stop(index);
}

fn is_disabled<D: Driver>(port: &mut Port<D>, index: u16) {
    port.handle.pause(index, true).unwrap();
}

/// Some frames have arrived, all others wait; what is lost when the receiver goes is what waited.
fn a_receiver_goes<D: Driver>(cores: [usize; 2]) {
    for goes in [stops as Goes<D>, is_disabled] {
        let mut wire = Wire::<D>::with_hold([1, 1], cores, FOR_EVER);
        wire.start_all();
        let [near, far] = &mut wire.ports;
        far.post(0, TAKEN);
        for number in 0..SENT {
            near.send(0, number, &payload(number, 200));
        }
        for number in 0..TAKEN {
            assert!(far.receive(0, number) == payload(number, 200), "{number}");
        }
        goes(far, 0);
        (0..SENT).for_each(|_| near.await_sent(0));
        assert_eq!(near.counter("tx_frames"), TAKEN);
        assert_eq!(drops(near, "tx"), one("peer_down", SENT - TAKEN));
        // Those that are sent now don't wait at all.
        (0..SENT).for_each(|number| near.send(0, number, &payload(number, 200)));
        (0..SENT).for_each(|_| near.await_sent(0));
        assert_eq!(drops(near, "tx"), one("peer_down", 2 * SENT - TAKEN));
        assert_eq!(far.counter("rx_frames"), TAKEN);
        assert_eq!(drops(far, "rx"), []);
        assert_eq!(near.drivers[1].used(), None, "each once");
        assert_eq!(far.drivers[0].used(), None, "none of them arrives");
    }
}

/// A receiver with a queue pair on the sender's worker and another elsewhere: the frames of each
/// pair wait there, and when one pair goes those that were not on their way yet go to the other.
fn a_receiver_goes_pair_by_pair<D: Driver>() {
    let mut wire = Wire::<D>::served_by([2, 2], [vec![0], vec![0, 1]], FOR_EVER);
    wire.start_all();
    let [near, far] = &mut wire.ports;
    for pair in 0..2 {
        far.post(pair, TAKEN);
        for number in 0..SENT {
            let seed = u64::from(pair) * SENT + number;
            near.send(pair, number, &payload(seed, 300));
        }
    }
    for pair in 0..2 {
        for number in 0..TAKEN {
            let seed = u64::from(pair) * SENT + number;
            assert!(far.receive(pair, number) == payload(seed, 300), "{seed}");
        }
    }
    for pair in 0..2 {
        far.stop(2 * pair);
    }
    for pair in 0..2 {
        (0..SENT).for_each(|_| near.await_sent(pair));
    }
    assert_eq!(near.counter("tx_frames"), 2 * TAKEN);
    assert_eq!(drops(near, "tx"), one("peer_down", 2 * (SENT - TAKEN)));
    assert_eq!(far.counter("rx_frames"), 2 * TAKEN);
    for pair in 0..2 {
        assert_eq!(far.drivers[2 * pair].used(), None, "none of them arrives");
    }
}

#[test]
fn frames_that_wait_on_both_workers_of_a_receiver_are_counted() {
    a_receiver_goes_pair_by_pair::<SplitDriver>();
    a_receiver_goes_pair_by_pair::<PackedDriver>();
}

/// What a sender that goes has given away is counted, and given back; what still is in its ring was
/// not taken, and arrives when the vring goes on.
fn a_sender_goes<D: Driver>(cores: [usize; 2]) {
    const HOLD: Duration = Duration::from_millis(20);
    let mut wire = Wire::<D>::with_hold([1, 1], cores, HOLD);
    wire.start_all();
    let [near, far] = &mut wire.ports;
    far.post(0, 1);
    // All at once, so that some are on their way when the first has come.
    near.send_burst(0, SENT, |number| payload(number, 200));
    assert!(far.receive(0, 0) == payload(0, 200));
    let base = near.pull(1);
    let back = core::iter::from_fn(|| near.drivers[1].used()).count() as u64;
    assert_eq!(near.counter("tx_frames"), 1);
    let lost = drops(near, "tx");
    match back {
        1 => assert_eq!(lost, []),
        _ => assert_eq!(lost, one("peer_full", back - 1)),
    }
    // Between two workers a burst is given away; on one its frames stay where they are.
    let [one_worker, gave] = [cores == ONE_WORKER, back > 1];
    assert!(one_worker || gave, "{back} came back");
    near.go_on(1, base);
    far.post(0, SENT - back);
    for number in back..SENT {
        let got = far.receive(0, number - back);
        assert!(got == payload(number, 200), "{number} of {back} on");
        near.await_sent(0);
    }
    assert_eq!(near.counter("tx_frames"), 1 + SENT - back);
    assert_eq!(drops(near, "tx"), lost);
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
    a_receiver_goes
    a_sender_goes
}
