//! Frames of every length around an MTU, from one guest to another, over many merged buffers.

use std::collections::VecDeque;

use vringd::device::DeviceModel;
use vringd::host::switch::PortRules;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, read_guest, write_guest};

use crate::support::deadline::wait_until;

use super::port::{PATIENCE, Port, SIZE, payload};
use super::switch::{Lan, frame, mac};
use super::wire::{ONE_WORKER, TWO_WORKERS, Wire};

/// Bytes of a receive buffer.
const BUFFER: u32 = 2048;
const HEADER: u32 = 12;
/// Where a frame to be sent is, beyond all buffers.
const FRAME: u64 = 0x20_0000;
/// The longest frame that there can be (VIRTIO 1.3 §5.1.6.3.1).
const LONGEST: usize = 65550;
const ETHERNET: usize = 14;
const MTUS: [u16; 4] = [68, 1500, 9000, 65535];
/// Frames that each pair sends where pairs are uneven.
const ROUNDS: u64 = 30;

/// One receive queue: the numbers of its buffers, in the order in which they were posted.
struct Receiver {
    pair: u16,
    posted: VecDeque<u64>,
}

impl Receiver {
    /// Posts buffers up to number `end`; those before `begin` were posted already.
    fn new<D: Driver>(port: &mut Port<D>, pair: u16, begin: u64, end: u64) -> Receiver {
        let mut receiver = Receiver {
            pair,
            posted: (0..begin).collect(),
        };
        receiver.post(port, begin..end);
        receiver
    }

    fn post<D: Driver>(&mut self, port: &mut Port<D>, numbers: impl Iterator<Item = u64>) {
        let index = 2 * self.pair;
        let driver = &mut port.drivers[usize::from(index)];
        for number in numbers {
            let buf = Buf::writable(Port::<D>::buffer(index, number), BUFFER);
            driver.add(&[buf]).expect("room in the ring");
            self.posted.push_back(number);
        }
        driver.publish();
    }

    /// The next frame, if it is there. Its buffers are posted again.
    fn poll<D: Driver>(&mut self, port: &mut Port<D>) -> Option<Vec<u8>> {
        let index = 2 * self.pair;
        let mut len = port.drivers[usize::from(index)].used()?.1;
        let mut numbers = Vec::new();
        let mut bytes = Vec::new();
        let mut count = 1;
        while count > 0 {
            let number = self.posted.pop_front().expect("a buffer was posted");
            let at = Port::<D>::buffer(index, number);
            bytes.extend(read_guest(&port.ram, at, len as usize));
            if numbers.is_empty() {
                count = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            numbers.push(number);
            count -= 1;
            if count > 0 {
                assert_eq!(len, BUFFER, "a buffer before the last is full");
                let driver = &mut port.drivers[usize::from(index)];
                len = wait_until("the other buffers", PATIENCE, || driver.used()).1;
            }
        }
        self.post(port, numbers.into_iter());
        Some(bytes.split_off(HEADER as usize))
    }

    fn receive<D: Driver>(&mut self, port: &mut Port<D>) -> Vec<u8> {
        wait_until("a frame", PATIENCE, || self.poll(port))
    }
}

/// Sends one frame, of any length, and waits for its buffer.
fn send<D: Driver>(port: &mut Port<D>, pair: u16, bytes: &[u8]) {
    write_guest(&port.ram, FRAME, &[0; HEADER as usize]);
    write_guest(&port.ram, FRAME + u64::from(HEADER), bytes);
    let len = HEADER + u32::try_from(bytes.len()).unwrap();
    let driver = &mut port.drivers[usize::from(2 * pair + 1)];
    driver.add(&[Buf::readable(FRAME, len)]).unwrap();
    driver.publish();
    port.await_sent(pair);
}

/// One more than fits, too, and that with a VLAN tag.
fn lengths(mtu: u16) -> impl Iterator<Item = usize> {
    let most = usize::from(mtu) + ETHERNET;
    [most - 1, most, most + 1, most + 4, most + 5].into_iter()
}

/// A cable has no MTU of its own: what a frame can be, passes.
fn a_wire_takes_what_a_frame_can_be<D: Driver>(cores: [usize; 2]) {
    let mut wire = Wire::<D>::new([1, 1], cores);
    wire.start_all();
    let all = u64::from(SIZE);
    let mut receivers = [0, 1].map(|at| Receiver::new(&mut wire.ports[at], 0, 0, all));
    let (mut passed, mut dropped) = (0, 0);
    for (seed, bytes) in (0..).zip(MTUS.into_iter().flat_map(lengths)) {
        let sent = payload(seed, bytes);
        for (from, to) in [(0, 1), (1, 0)] {
            send(&mut wire.ports[from], 0, &sent);
            if bytes <= LONGEST {
                let got = receivers[to].receive(&mut wire.ports[to]);
                assert!(got == sent, "{bytes} bytes, {} came", got.len());
            }
        }
        if bytes <= LONGEST {
            passed += 1;
        } else {
            dropped += 1;
        }
        for port in &wire.ports {
            assert_eq!(port.counter("rx_frames"), passed, "{bytes} bytes");
            assert_eq!(port.counter("tx_drop_too_big"), dropped, "{bytes} bytes");
        }
    }
    assert_eq!((passed, dropped), (18, 2));
}

/// At a switch, what is longer than the MTU of the port that it is for is dropped as such.
fn a_switch_port_is_given_what_its_mtu_allows<D: Driver>() {
    for mtu in MTUS {
        let rules = PortRules {
            mtu: Some(mtu),
            ..PortRules::default()
        };
        let mut lan = Lan::<D>::new(&[PortRules::default(), rules], 1);
        let all = u64::from(SIZE);
        let mut receivers = [0, 1].map(|at| Receiver::new(&mut lan.ports[at], 0, 32, all));
        // The switch knows where both are.
        for from in [1, 0] {
            let hello = frame([0xff; 6], from, None, 0);
            send(&mut lan.ports[from], 0, &hello);
            assert_eq!(receivers[1 - from].receive(&mut lan.ports[1 - from]), hello);
        }
        let (mut long, mut too_big) = (0, 0);
        for (seed, bytes) in (0..).zip(lengths(mtu)) {
            for (from, to, limited) in [(0, 1, true), (1, 0, false)] {
                let mut sent = [mac(to), mac(from)].concat();
                sent.extend([0x88, 0xb5]);
                sent.extend(payload(seed, bytes - ETHERNET));
                send(&mut lan.ports[from], 0, &sent);
                if bytes > LONGEST {
                    too_big += u64::from(limited);
                } else if limited && bytes > usize::from(mtu) + ETHERNET {
                    long += 1;
                } else {
                    let got = receivers[to].receive(&mut lan.ports[to]);
                    assert!(got == sent, "{bytes} bytes at MTU {mtu}");
                }
            }
            let counted = ["tx_drop_mtu", "tx_drop_too_big"].map(|name| lan.ports[0].counter(name));
            assert_eq!(counted, [long, too_big], "{bytes} bytes at MTU {mtu}");
        }
        let wanted = if mtu == 65535 { (1, 2) } else { (3, 0) };
        assert_eq!((long, too_big), wanted, "MTU {mtu}");
        assert_eq!(lan.ports[1].counter("tx_drop_mtu"), 0);
    }
}

/// Two pairs against one and four against three: whatever is sent on any pair arrives, once.
fn uneven_pairs_deliver_everything<D: Driver>(cores: [usize; 2]) {
    for pairs in [[2, 1], [4, 3]] {
        let mut wire = Wire::<D>::new(pairs, cores);
        wire.start_all();
        let mut receivers: Vec<Vec<Receiver>> = Vec::new();
        for (port, pairs) in wire.ports.iter_mut().zip(pairs) {
            let of_pair = |pair| Receiver::new(port, pair, 0, 16);
            receivers.push((0..pairs).map(of_pair).collect());
        }
        for round in 0..ROUNDS {
            for (from, to) in [(0, 1), (1, 0)] {
                for pair in 0..pairs[from] {
                    let seed = round * 16 + u64::from(pair);
                    let sent = payload(seed, 60 + usize::try_from(seed * 37 % 4000).unwrap());
                    send(&mut wire.ports[from], pair, &sent);
                    let got = wait_until("a frame on any pair", PATIENCE, || {
                        let port = &mut wire.ports[to];
                        let mut all = receivers[to].iter_mut();
                        all.find_map(|receiver| receiver.poll(port))
                    });
                    assert!(got == sent, "round {round}, pair {pair} of port {from}");
                }
            }
        }
        for at in [0, 1] {
            let (port, sent) = (&wire.ports[at], ROUNDS * u64::from(pairs[1 - at]));
            assert_eq!(port.counter("rx_frames"), sent, "{pairs:?}, port {at}");
            let counters = DeviceModel::counters(port.model.as_ref());
            let lost = counters
                .iter()
                .find(|(name, value)| name.contains("drop") && *value > 0);
            assert_eq!(lost, None, "{pairs:?}, port {at}");
        }
    }
}

#[test]
fn a_wire_takes_what_a_frame_can_be_on_every_ring_and_worker() {
    a_wire_takes_what_a_frame_can_be::<SplitDriver>(ONE_WORKER);
    a_wire_takes_what_a_frame_can_be::<PackedDriver>(ONE_WORKER);
    a_wire_takes_what_a_frame_can_be::<SplitDriver>(TWO_WORKERS);
    a_wire_takes_what_a_frame_can_be::<PackedDriver>(TWO_WORKERS);
}

#[test]
fn a_switch_port_is_given_what_its_mtu_allows_on_every_ring() {
    a_switch_port_is_given_what_its_mtu_allows::<SplitDriver>();
    a_switch_port_is_given_what_its_mtu_allows::<PackedDriver>();
}

#[test]
fn uneven_pairs_deliver_everything_on_every_ring_and_worker() {
    uneven_pairs_deliver_everything::<SplitDriver>(ONE_WORKER);
    uneven_pairs_deliver_everything::<PackedDriver>(ONE_WORKER);
    uneven_pairs_deliver_everything::<SplitDriver>(TWO_WORKERS);
    uneven_pairs_deliver_everything::<PackedDriver>(TWO_WORKERS);
}
