//! What a switch or a broken receiver loses: every frame that a port may send in is counted at each
//! port that it goes to, as received or with the reason why it was not.

use vringd::device::DeviceModel;
use vringd::host::switch::{PortRules, VlanMode, VlanSet};
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
pub(super) fn drops<D: Driver>(port: &Port<D>, direction: &str) -> Vec<(String, u64)> {
    let prefix = format!("{direction}_drop_");
    let all = DeviceModel::counters(port.model.as_ref());
    let drops = all.iter().filter_map(|(name, count)| {
        let reason = name.strip_prefix(&prefix)?;
        (*count > 0).then(|| (reason.to_owned(), *count))
    });
    drops.collect()
}

pub(super) fn one(reason: &str, count: u64) -> Vec<(String, u64)> {
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

fn access(vlan: u16) -> PortRules {
    PortRules {
        vlan: VlanMode::Access(vlan),
        ..PortRules::default()
    }
}

/// Sends one frame and waits until the switch has it.
fn send<D: Driver>(lan: &mut Lan<D>, from: usize, bytes: &[u8]) {
    lan.ports[from].send(0, 0, bytes);
    lan.ports[from].await_sent(0);
}

/// What reaches some ports and not others, and what reaches none.
fn refused_at_a_switch<D: Driver>() {
    let isolated = PortRules {
        isolated: true,
        ..access(10)
    };
    let small = PortRules {
        mtu: Some(100),
        ..access(10)
    };
    let mut allowed = VlanSet::new();
    allowed.insert(10);
    let trunk = PortRules {
        vlan: VlanMode::Trunk {
            allowed,
            native: None,
        },
        ..PortRules::default()
    };
    let rules = [
        isolated.clone(),
        isolated,
        small,
        access(10),
        trunk,
        access(30),
    ];
    let mut lan = Lan::<D>::new(&rules, 1);
    let [sender, lonely, other, down, far, apart] = [0, 1, 2, 3, 4, 5];
    lan.ports[down].stop(0);

    // To all, and to a station that nobody knows: too long for one port, and nobody is at another.
    for to in [ALL, mac(77)] {
        send(&mut lan, sender, &frame(to, sender, None, 154));
    }
    for number in 0..2 {
        let to = [ALL, mac(77)][usize::try_from(number).unwrap()];
        let with_tag = frame(to, sender, Some(10), 154);
        assert_eq!(receive(&mut lan.ports[far], number), with_tag);
    }
    assert_eq!(lan.ports[sender].counter("tx_frames"), 2);
    assert_eq!(drops(&lan.ports[lonely], "rx"), one("isolated", 2));
    assert_eq!(drops(&lan.ports[other], "rx"), one("mtu", 2));
    assert_eq!(drops(&lan.ports[down], "rx"), one("peer_down", 2));
    assert_eq!(drops(&lan.ports[far], "rx"), []);

    // Without its first tag it would be of another VLAN.
    let mut twice = frame(ALL, far, Some(10), 0);
    twice[16..20].copy_from_slice(&[0x81, 0, 0, 20]);
    send(&mut lan, far, &twice);
    for port in [sender, lonely, other, down] {
        let vlan = drops(&lan.ports[port], "rx");
        assert!(vlan.contains(&("vlan".to_owned(), 1)), "{port}: {vlan:?}");
    }
    assert_eq!(lan.ports[far].counter("tx_frames"), 1);

    // To the port that it came from, and where nobody else is.
    send(&mut lan, sender, &frame(mac(sender), 88, None, 3));
    send(&mut lan, apart, &frame(ALL, apart, None, 3));
    for port in [sender, apart] {
        assert_eq!(drops(&lan.ports[port], "tx"), one("no_port", 1));
    }
    assert_eq!(lan.ports[apart].counter("tx_frames"), 0);

    // A known station is lost to its sender, one among many that are for all to its port.
    send(&mut lan, down, &frame(ALL, down, None, 0));
    let before = lan.ports[down].counter("rx_drop_peer_down");
    send(&mut lan, other, &frame(mac(down), other, None, 5));
    assert_eq!(drops(&lan.ports[other], "tx"), one("peer_down", 1));
    assert_eq!(lan.ports[down].counter("rx_drop_peer_down"), before);

    // Whatever a port may send is counted at each port that it goes to.
    let sum = |name: &str| lan.ports.iter().map(|port| port.counter(name)).sum::<u64>();
    let lost: u64 = lan
        .ports
        .iter()
        .flat_map(|port| drops(port, "rx"))
        .map(|(_, n)| n)
        .sum();
    assert_eq!(sum("rx_frames") + lost, sum("tx_frames") * 4);
    for port in &lan.ports {
        assert!(drops(port, "tx").iter().all(|(_, count)| *count == 1));
    }
}

#[test]
fn what_a_port_of_a_switch_is_not_given_is_counted_there() {
    refused_at_a_switch::<SplitDriver>();
    refused_at_a_switch::<PackedDriver>();
}
