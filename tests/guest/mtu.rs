//! The least and the greatest MTU that a device may have (VIRTIO 1.3 §5.1.4.1), at a guest: "MTU
//! upper bound" and "lower bound" of OVS's own tests/system-dpdk.at, with the roles swapped.
//! What is beyond them is refused at the start (tests/cli.rs).

use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::guest::{Guest, GuestConfig, Nic};
use crate::support::tmp::TempDir;

const SOON: Duration = Duration::from_secs(20);
const MTU: u64 = 1 << 3;

/// Name, MTU, address, property of QEMU's card; QEMU tells the guest what it was told itself.
const CARDS: [(&str, u16, &str, &str); 3] = [
    ("long", 65535, "52:54:00:12:34:01", ",host_mtu=65535"),
    ("other", 65535, "52:54:00:12:34:02", ",host_mtu=65535"),
    ("short", 68, "52:54:00:12:34:03", ",host_mtu=68"),
];

/// All on one switch, `other` and `short` in namespaces of their own.
fn boot(dir: &TempDir) -> (Daemon, Guest) {
    let socket = |name: &str| dir.path(&format!("{name}.sock"));
    let nets = CARDS.map(|(name, mtu, ..)| {
        let socket = socket(name);
        let socket = socket.display();
        format!("--net=name={name},socket={socket},link=switch:lan,mtu={mtu}")
    });
    let mut arguments = vec!["run", "--core", "1"];
    arguments.extend(nets.iter().map(String::as_str));
    let daemon = Daemon::start(&arguments);
    let nics = CARDS.map(|(name, mtu, mac, extra)| Nic {
        socket: socket(name),
        queues: 1,
        // One of each at either end.
        packed: mtu == 68 || name == "long",
        mac,
        extra,
    });
    let mut guest = Guest::boot(&GuestConfig {
        nics: nics.into(),
        ..GuestConfig::default()
    });
    guest.ok("ip addr add 10.9.0.1/24 dev eth0 && ip link set eth0 up");
    for at in [1, 2] {
        guest.ok(&format!(
            "unshare -n sleep 1000 & echo $! >/tmp/ns{at}; \
             while [ $(readlink /proc/$!/ns/net) = $(readlink /proc/self/ns/net) ]; do :; done; \
             ip link set eth{at} netns $!"
        ));
        guest.ok(&inside(
            at,
            &format!("ip addr add 10.9.0.{}/24 dev eth{at}", at + 1),
        ));
        guest.ok(&inside(at, &format!("ip link set eth{at} up")));
    }
    (daemon, guest)
}

fn inside(at: usize, line: &str) -> String {
    format!("nsenter -t $(cat /tmp/ns{at}) -n {line}")
}

/// What is on its way to a card at either end of the range is not longer than it may be.
#[test]
fn the_mtu_is_as_short_and_as_long_as_may_be() {
    let dir = TempDir::new("mtu");
    let (daemon, mut guest) = boot(&dir);
    for (at, (name, mtu, ..)) in CARDS.into_iter().enumerate() {
        let said = daemon.wait_log(&format!("negotiated device={name} "), SOON);
        assert!(said.contains("VIRTIO_NET_F_MTU"), "{said}");
        let shown = format!("ip link show eth{at}");
        let shown = guest.ok(&if at == 0 { shown } else { inside(at, &shown) });
        assert!(shown.contains(&format!(" mtu {mtu} ")), "{shown}");
    }
    let bits = guest.features("/sys/class/net/eth0/device");
    assert_ne!(bits & MTU, 0, "{bits:#x}");
    for mtu in [67, 69] {
        let (status, said) = guest.run(&inside(2, &format!("ip link set eth2 mtu {mtu}")));
        assert_ne!(status, 0, "{mtu}: {said}");
    }
    let drops = || CARDS.map(|(name, ..)| daemon.counter(name, "tx_drop_mtu"));
    guest.ok("ping -c 2 -i 0.1 -W 5 -s 65507 10.9.0.2");
    guest.ok("ping -c 2 -i 0.1 -W 5 -s 40 10.9.0.3");
    assert_eq!(drops(), [0; 3]);
    // A byte more for the short one, and what is cut for it.
    let (status, said) = guest.run("ping -c 1 -W 1 -s 41 10.9.0.3");
    assert_ne!(status, 0, "69 pass: {said}");
    assert_eq!(drops(), [1, 0, 0]);
    guest.ok(&inside(2, "ping -c 1 -W 5 -s 40 10.9.0.2"));
    drop(guest);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
}
