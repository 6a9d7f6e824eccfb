//! What a guest and the host leave to each other through a tap of the daemon: datagrams to be cut
//! (USO), and segments of a connection that tells of congestion (ECN).

use std::net::UdpSocket;

use vringd::device::net::feature;
use vringd::sys::testnet::{PacketSocket, VNET_HEADER};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};
use vringd::testing::packets::{ACK, CWR, ECE, Packet, receive};

use crate::front_end::{FrontEnd, PATIENCE};
use crate::support::daemon::Daemon;
use crate::support::netns::Netns;
use crate::support::tmp::TempDir;
use crate::support::tun::segment;
use crate::support::{linux, missing};

const SIZE: u16 = 1000;
/// No multiple of what it is cut into.
const BYTES: usize = 9300;
const USO: u64 = feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6;
const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM;
/// Whom the packets of the model are for, and who sent them.
const TO: &str = "10.4.250.255:5201";
const FROM: &str = "10.1.2.3:12345";

/// A daemon with the tap `vt0` in a namespace, and a socket on it.
struct Place {
    daemon: Daemon,
    netns: Netns,
    host: PacketSocket,
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        let net = format!(
            "name=n,socket={},link=tap:vt0,netns={}",
            dir.path("n.sock").display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let host = netns.spawn(|| PacketSocket::bind("vt0")).join().unwrap();
        Place {
            daemon,
            netns,
            host,
            dir,
        }
    }

    /// A guest with these features, each of which is offered.
    fn guest<D: Driver>(&self, features: u64) -> FrontEnd<D> {
        FrontEnd::connect_with(&self.dir.path("n.sock"), 1, features)
    }

    /// A socket with which the host's own stack says and hears what the model's packets are: it
    /// has the station and the address that they are for, and a neighbour who has sent them.
    fn socket(&self) -> UdpSocket {
        self.netns
            .ok("ip link set vt0 address 02:00:00:00:00:02 && \
             ip addr add 10.4.250.255/8 dev vt0 && \
             ip neigh add 10.1.2.3 lladdr 02:00:00:00:00:01 dev vt0");
        let bound = self.netns.spawn(|| UdpSocket::bind(TO));
        let socket = bound.join().unwrap().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(FROM).unwrap();
        socket
    }
}

/// How the kernel writes the header that a driver wrote so: in ten bytes.
fn vnet(packet: &Packet, size: u16, ecn: bool) -> [u8; VNET_HEADER] {
    packet.vnet(size, ecn)[..VNET_HEADER].try_into().unwrap()
}

/// A datagram to be cut that crosses the tap whole, to the host and to the guest; and one that a
/// guest gets in pieces who does not take it otherwise.
fn datagrams_are_cut_by_who_gets_them<D: Driver>() {
    if linux() < (6, 2) {
        missing::<()>("no tap takes datagrams to be cut before Linux 6.2");
        return;
    }
    let place = Place::new();
    let socket = place.socket();
    let mut guest = place.guest::<D>(CSUM | USO);
    for v6 in [false, true] {
        let packet = Packet::new(v6, true, BYTES);
        let (header, bytes) = (vnet(&packet, SIZE, false), packet.unfinished());
        guest.transmit_with(0, &packet.vnet(SIZE, false), &bytes);
        let (seen, got) = place.host.receive_if(|got| got.len() > 1514);
        assert!(got == bytes, "IPv6: {v6}, {} bytes", got.len());
        assert_eq!(seen, header, "IPv6: {v6}");
        // The kernel's own stack gets them cut.
        for part in packet.payload.chunks(SIZE.into()).filter(|_| !v6) {
            let mut got = [0; BYTES];
            let length = socket.recv(&mut got).unwrap();
            assert!(got[..length] == *part, "{length} of {}", part.len());
        }
        place.host.send(&header, &bytes);
        let (seen, got) = guest.receive_if(0, |_| true);
        assert!(got == bytes, "IPv6: {v6}, {} bytes", got.len());
        assert_eq!(seen, header, "IPv6: {v6}");
    }
    // What the host's stack leaves to be cut.
    let packet = Packet::new(false, true, BYTES);
    segment(&socket, SIZE);
    assert_eq!(socket.send(&packet.payload).unwrap(), BYTES);
    let (seen, got) = guest.receive_if(0, |_| true);
    assert_eq!(seen, vnet(&packet, SIZE, false));
    assert_eq!(got.len(), packet.headers() + BYTES);
    assert!(got[packet.headers()..] == packet.payload, "other bytes");
    assert_eq!(place.daemon.counter("n", "rx_frames"), 3);
    assert_eq!(place.daemon.counter("n", "tx_frames"), 2);

    // Without a word about it in the guest's features.
    drop(guest);
    let mut guest = place.guest::<D>(feature::CSUM | feature::HOST_USO);
    for v6 in [false, true] {
        let packet = Packet::new(v6, true, BYTES);
        place
            .host
            .send(&vnet(&packet, SIZE, false), &packet.unfinished());
        let mut carried = Vec::new();
        for wanted in packet.cut(SIZE.into()) {
            let got = guest.receive(0);
            assert!(got == wanted, "IPv6: {v6}, {got:02x?}");
            carried.extend(receive(&got));
        }
        assert_eq!(carried, packet.payload);
    }
    let (status, log) = place.daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn datagrams_are_cut_by_who_gets_them_split() {
    datagrams_are_cut_by_who_gets_them::<SplitDriver>();
}

#[test]
fn datagrams_are_cut_by_who_gets_them_packed() {
    datagrams_are_cut_by_who_gets_them::<PackedDriver>();
}

/// The header that leaves tells of congestion as the guest's does, and where the kernel cuts the
/// frame, on its way out of an interface that can't, the first segment alone has CWR. The same the
/// other way: whole to a guest that knows what that is, cut to one that does not.
fn congestion_is_told_once<D: Driver>() {
    let place = Place::new();
    place.netns.ok("ip link add va type veth peer name vb && \
         ethtool -K va tx off tso off gso off && ip link add br0 type bridge && \
         ip link set vt0 master br0 && ip link set va master br0 && \
         for i in va vb br0; do ip link set $i up; done");
    let out = place.netns.spawn(|| PacketSocket::bind("vb")).join();
    let out = out.unwrap();
    let knows = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
    let sends = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
    let mut guest = place.guest::<D>(CSUM | sends | knows);
    let is_tcp = |got: &[u8]| got[..12] == [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for (v6, ecn) in [(false, true), (true, true), (false, false), (true, false)] {
        let mut packet = Packet::new(v6, false, BYTES);
        // ECE stays on all of them.
        packet.flags = ACK | if ecn { CWR | ECE } else { 0 };
        let (header, bytes) = (vnet(&packet, SIZE, ecn), packet.unfinished());
        guest.transmit_with(0, &packet.vnet(SIZE, ecn), &bytes);
        let (seen, got) = place.host.receive_if(is_tcp);
        assert!(got == bytes, "{v6}, {ecn}: {} bytes", got.len());
        assert_eq!(seen, header, "{v6}, {ecn}");
        for wanted in packet.cut(SIZE.into()) {
            let (seen, got) = out.receive_if(is_tcp);
            assert!(got == wanted, "{v6}, {ecn}: {got:02x?}");
            assert_eq!(seen, [0; VNET_HEADER], "nothing is left to be done");
        }
        place.host.send(&header, &bytes);
        let (seen, got) = guest.receive_if(0, is_tcp);
        assert!(got == bytes, "{v6}, {ecn}: {} bytes", got.len());
        assert_eq!(seen, header, "{v6}, {ecn}");
    }
    drop(guest);
    let mut guest = place.guest::<D>(sends | feature::CSUM);
    let mut packet = Packet::new(false, false, BYTES);
    packet.flags = ACK | CWR | ECE;
    place
        .host
        .send(&vnet(&packet, SIZE, true), &packet.unfinished());
    for wanted in packet.cut(SIZE.into()) {
        let (seen, got) = guest.receive_if(0, is_tcp);
        assert!(got == wanted, "{got:02x?}");
        assert_eq!(seen, [0; VNET_HEADER], "nothing is left to be done");
    }
    let (status, log) = place.daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn congestion_is_told_once_split() {
    congestion_is_told_once::<SplitDriver>();
}

#[test]
fn congestion_is_told_once_packed() {
    congestion_is_told_once::<PackedDriver>();
}
