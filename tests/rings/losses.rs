//! What a switch or a broken receiver loses: every frame that a port may send in is counted at each
//! port that it goes to, as received or with the reason why it was not.

use vringd::device::DeviceModel;
use vringd::host::switch::PortRules;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, read_guest};

use crate::support::deadline::wait_until;

use super::port::{PATIENCE, Port, payload};
use super::switch::{Lan, frame, mac};
use super::wire::{ONE_WORKER, TWO_WORKERS, Wire};

const ALL: [u8; 6] = [0xff; 6];

/// Posts a receive buffer that is no memory.
fn break_receiver<D: Driver>(port: &mut Port<D>) {
    port.drivers[0]
        .add(&[Buf::writable(1 << 40, 2048)])
        .unwrap();
    port.drivers[0].publish();
}

/// What a port dropped in one direction, by reason; those that it did not are left out.
fn drops<D: Driver>(port: &Port<D>, direction: &str) -> Vec<(String, u64)> {
    let prefix = format!("{direction}_drop_");
    let all = DeviceModel::counters(port.model.as_ref());
    let drops = all.iter().filter_map(|(name, count)| {
        let reason = name.strip_prefix(&prefix)?;
        (*count > 0).then(|| (reason.to_owned(), *count))
    });
    drops.collect()
}

fn one(reason: &str, count: u64) -> Vec<(String, u64)> {
    vec![(reason.to_owned(), count)]
}

/// The next frame, from whatever buffer it is in.
fn receive<D: Driver>(port: &mut Port<D>, number: u64) -> Vec<u8> {
    let driver = &mut port.drivers[0];
    let (_, len) = wait_until("a frame comes", PATIENCE, || driver.used());
    read_guest(
        &port.ram,
        Port::<D>::buffer(0, number) + 12,
        len as usize - 12,
    )
}

fn broken_on_a_wire<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    wire.start_all();
    wire.ports[1].post(0, 2);
    break_receiver(&mut wire.ports[1]);
    for number in 0..6 {
        wire.ports[0].send(0, number, &payload(number, 100));
        wire.ports[0].await_sent(0);
    }
    for number in 0..2 {
        assert_eq!(receive(&mut wire.ports[1], number), payload(number, 100));
    }
    assert_eq!(wire.ports[0].counter("tx_frames"), 2);
    assert_eq!(drops(&wire.ports[0], "tx"), one("peer_broken", 4));
    assert_eq!(wire.ports[1].counter("rx_frames"), 2);
    assert_eq!(drops(&wire.ports[1], "rx"), one("peer_broken", 4));
}

#[test]
fn frames_for_a_broken_ring_are_counted_on_a_wire() {
    broken_on_a_wire::<SplitDriver>(ONE_WORKER);
    broken_on_a_wire::<PackedDriver>(ONE_WORKER);
    broken_on_a_wire::<SplitDriver>(TWO_WORKERS);
    broken_on_a_wire::<PackedDriver>(TWO_WORKERS);
}

/// Frames for a broken port alone, and for all.
fn broken_at_a_switch<D: Driver>() {
    let mut lan = Lan::<D>::new(&vec![PortRules::default(); 3], 1);
    lan.ports[1].send(0, 0, &frame(ALL, 1, None, 1));
    assert_eq!(receive(&mut lan.ports[0], 0), frame(ALL, 1, None, 1));
    break_receiver(&mut lan.ports[1]);
    // Its good buffers come first.
    for number in 0..32 + 6 {
        let to = if number % 2 == 0 { mac(1) } else { ALL };
        lan.ports[0].send(0, number, &frame(to, 0, None, 7));
        lan.ports[0].await_sent(0);
    }
    assert_eq!(lan.ports[0].counter("tx_frames"), 38);
    assert_eq!(lan.ports[1].counter("rx_frames"), 32);
    assert_eq!(drops(&lan.ports[1], "rx"), one("peer_broken", 6));
    // Nobody else has lost any.
    assert_eq!(lan.ports[2].counter("rx_frames"), 1 + 19);
    assert_eq!(drops(&lan.ports[2], "rx"), []);
}

#[test]
fn frames_for_a_broken_ring_are_counted_at_a_switch() {
    broken_at_a_switch::<SplitDriver>();
    broken_at_a_switch::<PackedDriver>();
}
