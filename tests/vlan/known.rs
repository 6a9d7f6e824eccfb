//! No frame for a station that the switch knows gets into another VLAN, or to another port: from
//! every port, in every form, to every station of every VLAN, a tap's among them.

use vringd::sys::testnet::{PacketSocket, VNET_HEADER};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::model::{PORTS, Port, Tag, Tags, given, kinds, port, taken};
use crate::front_end::FrontEnd;
use crate::support::daemon::Daemon;
use crate::support::netns::Netns;
use crate::support::tmp::{TempDir, random_bytes};

/// The host's, a tap.
const UPLINK: Port = port("vlan=trunk:10+21,vlan_native=20", &[10, 21], Some(20));
const ALL: [u8; 6] = [0xff; 6];
/// An address that is one station in each of these VLANs, at different ports.
const SHARED: [(usize, u16); 3] = [(1, 10), (2, 20), (3, 1)];

type Mac = [u8; 6];

fn ports() -> impl Iterator<Item = (usize, &'static Port)> {
    PORTS.iter().chain([&UPLINK]).enumerate()
}

/// What every port is a member of.
fn memberships() -> Vec<(usize, u16)> {
    let of_port = |(at, port): (usize, &'static Port)| {
        let vlans = port.tagged.iter().copied().chain(port.untagged);
        vlans.map(move |vlan| (at, vlan))
    };
    ports().flat_map(of_port).collect()
}

/// The station of a port in a VLAN, which is seen in no other.
fn station((at, vlan): (usize, u16)) -> Mac {
    let [high, low] = vlan.to_be_bytes();
    [2, 9, u8::try_from(at).unwrap(), high, low, 0]
}

fn shared() -> Mac {
    [2, 9, 0xff, 0, 0, 0]
}

/// Where the switch has seen `to` in `vlan`.
fn seen_at(to: Mac, vlan: u16) -> Option<usize> {
    let at = |places: &[(usize, u16)]| {
        let found = places.iter().find(|(_, of)| *of == vlan);
        found.map(|&(at, _)| at)
    };
    if to == shared() {
        return at(&SHARED);
    }
    let own: Vec<_> = memberships()
        .into_iter()
        .filter(|&place| station(place) == to)
        .collect();
    at(&own)
}

struct Lan<D> {
    daemon: Daemon,
    guests: Vec<FrontEnd<D>>,
    host: PacketSocket,
    frames: u64,
    _netns: Netns,
    _dir: TempDir,
}

impl<D: Driver> Lan<D> {
    fn start() -> Lan<D> {
        let (netns, dir) = (Netns::new(), TempDir::new("known"));
        netns.ok("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        let socket = |at: usize| dir.path(&format!("{at}.sock"));
        let nets = (0..PORTS.len()).map(|at| {
            let (socket, option) = (socket(at), PORTS[at].option);
            let socket = socket.display();
            format!("--net=name=p{at},socket={socket},link=switch:lan,{option}")
        });
        let uplink = format!(
            "--net=name=up,link=switch:lan,host=tap:up0,{}",
            UPLINK.option
        );
        let nets: Vec<_> = nets.chain([uplink]).collect();
        let mut arguments = vec!["run", "--core", "1"];
        arguments.extend(nets.iter().map(String::as_str));
        let daemon = Daemon::start_in(&netns, &arguments);
        netns.ok("ip link set up0 up");
        let host = netns.spawn(|| PacketSocket::bind("up0")).join().unwrap();
        Lan {
            guests: (0..PORTS.len())
                .map(|at| FrontEnd::connect(&socket(at), 1))
                .collect(),
            host,
            daemon,
            frames: 0,
            _netns: netns,
            _dir: dir,
        }
    }

    /// Payload that no other frame has.
    fn body(&mut self) -> Vec<u8> {
        self.frames += 1;
        let bytes = 60 + usize::try_from(self.frames % 1000).unwrap();
        random_bytes(self.frames, bytes)
    }

    /// Sends frames with these tags from port `from` to `to`, at once, and sees that each port
    /// gets what it must. What a port gets beside that, it gets before what comes next.
    fn send(&mut self, from: usize, to: Mac, kinds: &[Tags]) {
        let mut sent = Vec::new();
        let mut due = vec![Vec::new(); PORTS.len() + 1];
        let (_, port) = ports().nth(from).unwrap();
        for tags in kinds {
            let body = self.body();
            let Some((vlan, priority, rest)) = taken(port, tags) else {
                // Nothing is learned of a frame that may not come in.
                sent.push(frame(to, to, tags, &body));
                continue;
            };
            let sender = station((from, vlan));
            sent.push(frame(to, sender, tags, &body));
            let only = seen_at(to, vlan);
            for (at, other) in ports().filter(|(at, _)| *at != from) {
                let is_for = only.is_none_or(|only| only == at);
                if let (true, Some(tags)) = (is_for, given(other, vlan, priority, rest)) {
                    due[at].push(frame(to, sender, &tags, &body));
                }
            }
        }
        self.put(from, &sent);
        for (at, due) in due.iter().enumerate() {
            for due in due {
                let got = self.get(at);
                let (to, kinds) = (&to[..], &due[..26]);
                assert!(
                    got == *due,
                    "p{from} to {to:x?}: p{at} got {:02x?}, not {kinds:02x?}",
                    &got[..26]
                );
            }
        }
    }

    fn put(&mut self, from: usize, frames: &[Vec<u8>]) {
        let frames: Vec<_> = frames.iter().map(Vec::as_slice).collect();
        match self.guests.get_mut(from) {
            Some(guest) => guest.transmit_all(0, &[0; 12], &frames),
            None => {
                let plain = [0; VNET_HEADER];
                frames
                    .iter()
                    .for_each(|frame| self.host.send(&plain, frame));
            }
        }
    }

    fn get(&mut self, at: usize) -> Vec<u8> {
        match self.guests.get_mut(at) {
            Some(guest) => guest.receive(0),
            None => {
                let own = u8::try_from(at).unwrap();
                let is_in = |frame: &[u8]| frame[6..8] == [2, 9] && frame[8] != own;
                self.host.receive_if(is_in).1
            }
        }
    }

    /// Every station says where it is: to all of its VLAN, and to nobody else.
    fn announce(&mut self) {
        for (at, vlan) in memberships() {
            self.send(at, ALL, &[own_tags(at, vlan)]);
        }
    }
}

/// How a port sends in a VLAN of its own.
fn own_tags(at: usize, vlan: u16) -> Tags {
    let (_, port) = ports().nth(at).unwrap();
    given(port, vlan, 0, &[]).unwrap()
}

fn frame(to: Mac, from: Mac, tags: &[Tag], body: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    for &(vlan, priority) in tags {
        frame.extend([0x81, 0x00]);
        frame.extend((vlan | priority << 13).to_be_bytes());
    }
    frame.extend([0x88, 0xb5]);
    frame.extend(body);
    frame
}

fn nothing_leaks<D: Driver>() {
    let mut lan = Lan::<D>::start();
    lan.announce();
    for (at, vlan) in SHARED {
        // Untagged all three; what the others get of it is what the next frames are behind.
        let hello = frame(
            ALL,
            shared(),
            &own_tags(at, vlan),
            &[at.to_le_bytes()[0]; 60],
        );
        lan.put(at, std::slice::from_ref(&hello));
        for (other, port) in ports().filter(|(other, _)| *other != at) {
            if let Some(tags) = given(port, vlan, 0, &[]) {
                let due = frame(ALL, shared(), &tags, &hello[14..]);
                assert!(lan.get(other) == due, "p{at} to all: p{other}");
            }
        }
    }
    let kinds = kinds();
    let mut stations: Vec<_> = memberships().into_iter().map(station).collect();
    stations.push(shared());
    for from in 0..=PORTS.len() {
        for &to in &stations {
            // All alike, and some that are alike before others.
            lan.send(from, to, &vec![vec![]; 3]);
            lan.send(from, to, &[&vec![vec![]; 2][..], &kinds].concat());
        }
    }
    // Behind these nothing comes.
    lan.announce();
    for (at, guest) in lan.guests.iter_mut().enumerate() {
        assert_eq!(guest.poll(0), None, "p{at}");
    }
    let (status, log) = lan.daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn no_frame_for_a_known_station_leaves_its_vlan_split() {
    nothing_leaks::<SplitDriver>();
}

#[test]
fn no_frame_for_a_known_station_leaves_its_vlan_packed() {
    nothing_leaks::<PackedDriver>();
}
