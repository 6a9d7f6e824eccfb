//! Guests at a switch, on one worker.

use std::sync::Arc;

use vringd::device::DeviceModel;
use vringd::engine::{Engine, EngineOptions, LinkSpec, Member, Parts};
use vringd::host::switch::{PortRules, VlanMode, VlanSet};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::port::{PATIENCE, Port, model};

/// Guests and their addresses: the last byte is the port's number.
pub(super) struct Lan<D: Driver> {
    engine: Option<Engine>,
    pub(super) ports: Vec<Port<D>>,
}

pub(super) fn mac(port: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(port).unwrap()]
}

pub(super) fn frame(to: [u8; 6], from: usize, vlan: Option<u16>, seed: usize) -> Vec<u8> {
    let mut bytes = [to, mac(from)].concat();
    if let Some(vlan) = vlan {
        bytes.extend([0x81, 0]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend([0x88, 0xb5]);
    bytes.extend((0..46 + seed % 1400).map(|at| (at * 13 + seed).to_le_bytes()[0]));
    bytes
}

impl<D: Driver> Lan<D> {
    pub(super) fn new(rules: &[PortRules], pairs: u16) -> Lan<D> {
        let models: Vec<_> = (0..rules.len())
            .map(|port| model(&format!("net{port}"), pairs))
            .collect();
        let member = |(model, rules): (&Arc<_>, &PortRules)| Member {
            parts: Parts::Net(
                Arc::clone(model),
                LinkSpec::Switch {
                    switch: 0,
                    rules: Box::new(rules.clone()),
                },
            ),
            cores: vec![0, 1],
        };
        let options = EngineOptions {
            cores: vec![0, 1],
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let members = models.iter().zip(rules).map(member).collect();
        let (engine, handles) = Engine::start(&options, members).unwrap();
        let mut ports: Vec<_> = handles
            .into_iter()
            .zip(models)
            .map(|(handle, model)| Port::<D>::new(handle, model))
            .collect();
        for port in &mut ports {
            (0..port.model.vrings_max()).for_each(|index| port.start(index));
            (0..pairs).for_each(|pair| port.post(pair, 32));
        }
        Lan {
            engine: Some(engine),
            ports,
        }
    }
}

impl<D: Driver> Drop for Lan<D> {
    fn drop(&mut self) {
        for port in &mut self.ports {
            for index in port.started.clone() {
                port.stop(index);
            }
        }
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

fn everybody_reaches_everybody<D: Driver>() {
    let mut lan = Lan::<D>::new(&vec![PortRules::default(); 4], 1);
    let mut received = [0; 4];
    for from in 0..4 {
        let hello = frame([0xff; 6], from, None, from);
        lan.ports[from].send(0, 0, &hello);
        for to in (0..4).filter(|&to| to != from) {
            assert_eq!(lan.ports[to].receive(0, received[to]), hello);
            received[to] += 1;
        }
        lan.ports[from].await_sent(0);
    }
    for from in 0..4 {
        for to in (0..4).filter(|&to| to != from) {
            let letter = frame(mac(to), from, None, 100 * from + to);
            lan.ports[from].send(0, 0, &letter);
            assert_eq!(lan.ports[to].receive(0, received[to]), letter);
            received[to] += 1;
            lan.ports[from].await_sent(0);
        }
    }
    // Three broadcasts and three letters each: nobody got what was for another.
    for port in &lan.ports {
        assert_eq!(port.counter("rx_frames"), 6);
        assert_eq!(port.counter("tx_frames"), 4);
    }
}

fn one_port_without_buffers_stalls_nobody<D: Driver>() {
    let mut lan = Lan::<D>::new(&vec![PortRules::default(); 3], 1);
    // 32 broadcasts take all buffers of both; only one posts more.
    for number in 0..32 {
        lan.ports[0].send(0, number, &frame([0xff; 6], 0, None, 7));
    }
    (0..32).for_each(|_| lan.ports[0].await_sent(0));
    for number in 0..32 {
        lan.ports[1].receive(0, number);
    }
    lan.ports[1].post(0, 8);
    for number in 0..8 {
        lan.ports[0].send(0, number, &frame([0xff; 6], 0, None, 9));
    }
    for number in 0..8 {
        assert_eq!(
            lan.ports[1].receive(0, number),
            frame([0xff; 6], 0, None, 9)
        );
        lan.ports[0].await_sent(0);
    }
    assert_eq!(lan.ports[2].counter("rx_drop_peer_full"), 8);
    assert_eq!(lan.ports[2].counter("rx_frames"), 32);
}

/// The first frame finds nobody there; the station may be anywhere then, and is found again where
/// it speaks. One that is there for good stays lost.
fn a_station_whose_port_is_down_is_lost_to_its_sender_and_forgotten<D: Driver>() {
    let fixed = PortRules {
        stations: vec![mac(9)],
        ..PortRules::default()
    };
    // From an access port among its like a burst goes whole, from a trunk in shares.
    let mut allowed = VlanSet::new();
    allowed.insert(10);
    let trunk = PortRules {
        vlan: VlanMode::Trunk {
            allowed,
            native: Some(1),
        },
        ..PortRules::default()
    };
    for sender in [PortRules::default(), trunk] {
        let mut lan = Lan::<D>::new(&[sender, fixed.clone(), PortRules::default()], 1);
        lan.ports[1].send(0, 0, &frame([0xff; 6], 1, None, 1));
        lan.ports[0].receive(0, 0);
        lan.ports[2].receive(0, 0);
        lan.ports[1].stop(0);
        let letter = frame(mac(1), 0, None, 2);
        for number in 0..2 {
            lan.ports[0].send(0, number, &letter);
            lan.ports[0].await_sent(0);
            assert_eq!(lan.ports[0].counter("tx_drop_peer_down"), 1);
        }
        assert_eq!(lan.ports[2].receive(0, 1), letter, "the second, to all");
        for number in 2..4 {
            lan.ports[0].send(0, number, &frame(mac(9), 0, None, 3));
            lan.ports[0].await_sent(0);
            assert_eq!(lan.ports[0].counter("tx_drop_peer_down"), number);
        }
        // It is at another port now.
        lan.ports[2].send(0, 0, &frame([0xff; 6], 1, None, 4));
        lan.ports[0].receive(0, 1);
        lan.ports[0].send(0, 4, &letter);
        assert_eq!(lan.ports[2].receive(0, 2), letter);
        assert_eq!(lan.ports[2].counter("rx_frames"), 3);
    }
}

fn vlans_with_queues<D: Driver>() {
    let mut allowed = VlanSet::new();
    allowed.insert(10);
    let trunk = PortRules {
        vlan: VlanMode::Trunk {
            allowed,
            native: None,
        },
        ..PortRules::default()
    };
    let access = |vlan| PortRules {
        vlan: VlanMode::Access(vlan),
        ..PortRules::default()
    };
    let mut lan = Lan::<D>::new(&[trunk, access(10), access(20)], 2);
    for pair in 0..2 {
        lan.ports[1].send(pair, 0, &frame([0xff; 6], 1, None, 30));
        let got = lan.ports[0].receive(pair, 0);
        assert_eq!(
            got,
            frame([0xff; 6], 1, Some(10), 30),
            "with its tag, on its pair"
        );
        lan.ports[0].send(pair, 0, &frame(mac(1), 0, Some(10), 31));
        assert_eq!(lan.ports[1].receive(pair, 0), frame(mac(1), 0, None, 31));
    }
    assert_eq!(lan.ports[2].counter("rx_frames"), 0);
    lan.ports[0].send(0, 1, &frame([0xff; 6], 0, Some(20), 1));
    lan.ports[0].await_sent(0);
    lan.ports[0].await_sent(0);
    assert_eq!(lan.ports[0].counter("tx_drop_vlan"), 1);
}

macro_rules! both {
    ($($name:ident)*) => {
        mod split { $(#[test] fn $name() { super::$name::<super::SplitDriver>(); })* }
        mod packed { $(#[test] fn $name() { super::$name::<super::PackedDriver>(); })* }
    };
}

both! {
    everybody_reaches_everybody
    one_port_without_buffers_stalls_nobody
    a_station_whose_port_is_down_is_lost_to_its_sender_and_forgotten
    vlans_with_queues
}
