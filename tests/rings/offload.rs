//! Guests that negotiated different offloads, on every kind of link: what the receiver did not
//! acknowledge is done for it.

use std::sync::Arc;

use vringd::device::DeviceModel;
use vringd::device::net::feature;
use vringd::engine::{Engine, EngineOptions, LinkSpec, Member, Parts};
use vringd::host::switch::{PortRules, VlanMode, VlanSet};
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver, read_guest, write_guest};
use vringd::testing::packets::{Packet, receive};

use crate::support::deadline::wait_until;

use super::port::{PATIENCE, Port, SIZE, model};

/// Where frames are sent from: beyond the buffers of all rings.
const FRAME: u64 = 0x30_0000;
const SENDER: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO;
const TSO: u64 = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
const USO: u64 = feature::GUEST_USO4 | feature::GUEST_USO6;
const RECEIVERS: [u64; 5] = [
    0,
    feature::GUEST_CSUM,
    feature::GUEST_CSUM | TSO,
    feature::GUEST_CSUM | USO,
    feature::GUEST_CSUM | TSO | USO,
];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Wire,
    WireOfTwoWorkers,
    /// The receiver is behind a trunk: its frames have a tag.
    Switch,
    Echo,
}

/// A sender and a receiver, which are one guest where frames come back.
struct Line<D: Driver> {
    engine: Option<Engine>,
    ports: Vec<Port<D>>,
}

impl<D: Driver> Line<D> {
    fn new(kind: Kind, receiver: u64) -> Line<D> {
        let cores: [&[usize]; 2] = match kind {
            Kind::WireOfTwoWorkers => [&[0], &[1]],
            _ => [&[0], &[0]],
        };
        let count = if matches!(kind, Kind::Echo) { 1 } else { 2 };
        let models: Vec<_> = (0..count).map(|at| model(&format!("net{at}"), 1)).collect();
        let mut allowed = VlanSet::new();
        allowed.insert(1);
        let trunk = VlanMode::Trunk {
            allowed,
            native: None,
        };
        let link = |at: usize| match kind {
            Kind::Echo => LinkSpec::Echo,
            Kind::Switch => LinkSpec::Switch {
                switch: 0,
                rules: Box::new(PortRules {
                    vlan: if at == 1 {
                        trunk.clone()
                    } else {
                        VlanMode::default()
                    },
                    ..PortRules::default()
                }),
            },
            Kind::Wire | Kind::WireOfTwoWorkers => LinkSpec::Wire {
                peer: 1 - at,
                hold: PATIENCE,
            },
        };
        let member = |at: usize| Member {
            parts: Parts::Net(Arc::clone(&models[at]), link(at)),
            cores: cores[at].to_vec(),
        };
        let options = EngineOptions {
            cores: [cores[0], &cores[1][..cores[1][0]]].concat(),
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let (engine, handles) = Engine::start(&options, (0..count).map(member).collect()).unwrap();
        let ports = handles.into_iter().zip(models.clone());
        let mut line = Line {
            engine: Some(engine),
            ports: ports
                .map(|(handle, model)| Port::new(handle, model))
                .collect(),
        };
        for port in &mut line.ports {
            (0..port.model.vrings_max()).for_each(|index| {
                port.start_with(index, SENDER | receiver, None);
            });
            port.post(0, SIZE.into());
        }
        line
    }

    fn send(&mut self, vnet: [u8; 12], frame: &[u8]) {
        let bytes = [vnet.as_slice(), frame].concat();
        let port = &mut self.ports[0];
        write_guest(&port.ram, FRAME, &bytes);
        let (head, tail) = (30, u32::try_from(bytes.len()).unwrap() - 30);
        let pieces = [Buf::readable(FRAME, head), Buf::readable(FRAME + 30, tail)];
        port.drivers[1].add(&pieces).unwrap();
        port.drivers[1].publish();
    }

    /// The next frame with its header, from the buffer `next` and those after it.
    fn receive(&mut self, next: &mut u64) -> (Vec<u8>, Vec<u8>) {
        let port = self.ports.last_mut().unwrap();
        let mut bytes = Vec::new();
        let mut left = 1;
        while left > 0 {
            let driver = &mut port.drivers[0];
            let (_, len) = wait_until("a frame comes", PATIENCE, || driver.used());
            let here = read_guest(&port.ram, Port::<D>::buffer(0, *next), len as usize);
            if bytes.is_empty() {
                left = u16::from_le_bytes([here[10], here[11]]);
            }
            bytes.extend(here);
            (*next, left) = (*next + 1, left - 1);
        }
        (bytes[..12].to_vec(), bytes[12..].to_vec())
    }
}

impl<D: Driver> Drop for Line<D> {
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

/// Every frame that a sender may send, with what its receiver must have acknowledged.
fn frames() -> Vec<(Packet, u16, u64)> {
    let mut out = Vec::new();
    for (v6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        let guest = match (udp, v6) {
            (true, _) => USO,
            (_, false) => feature::GUEST_TSO4,
            (_, true) => feature::GUEST_TSO6,
        };
        out.push((Packet::new(v6, udp, 777), 0, feature::GUEST_CSUM));
        out.push((
            Packet::new(v6, udp, 6001),
            1400,
            feature::GUEST_CSUM | guest,
        ));
    }
    out
}

fn completed<D: Driver>(kind: Kind) {
    for receiver in RECEIVERS {
        let mut line = Line::<D>::new(kind, receiver);
        let (mut next, mut csum, mut segments) = (0, 0, 0);
        for (packet, size, needs) in frames() {
            line.send(packet.vnet(size, false), &packet.unfinished());
            let mut seen = packet.clone();
            if matches!(kind, Kind::Switch) {
                seen.tags.push(1);
            }
            let whole = receiver & needs == needs;
            let wanted = match (whole, size) {
                (true, _) => vec![seen.unfinished()],
                (false, 0) => vec![seen.whole()],
                (false, size) => seen.cut(size.into()),
            };
            let mut carried = Vec::new();
            for wanted in &wanted {
                let (header, frame) = line.receive(&mut next);
                assert!(frame == *wanted, "{kind:?}, {receiver:#x}, {size}");
                let asks = if whole {
                    seen.vnet(size, false)
                } else {
                    [0; 12]
                };
                assert_eq!(header[..10], asks[..10]);
                if !whole {
                    carried.extend(receive(&frame));
                }
            }
            line.ports[0].await_sent(0);
            if !whole {
                assert_eq!(carried, packet.payload);
                csum += u64::from(size == 0);
                segments += if size == 0 { 0 } else { wanted.len() as u64 };
            }
        }
        let port = line.ports.last().unwrap();
        assert_eq!(port.counter("rx_software_csum"), csum);
        assert_eq!(port.counter("rx_software_segments"), segments);
        assert_eq!(port.counter("rx_drop_no_offload"), 0);
        assert_eq!(line.ports[0].counter("tx_frames"), frames().len() as u64);
    }
}

macro_rules! lines {
    ($($name:ident: $kind:ident)*) => {
        $(mod $name {
            #[test]
            fn split() { super::completed::<super::SplitDriver>(super::Kind::$kind); }
            #[test]
            fn packed() { super::completed::<super::PackedDriver>(super::Kind::$kind); }
        })*
    };
}

lines! {
    wire: Wire
    wire_of_two_workers: WireOfTwoWorkers
    switch: Switch
    echo: Echo
}
