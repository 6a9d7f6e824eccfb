//! Rates of ports whose front-end is Open vSwitch: what OVS's own tests/system-dpdk.at does with
//! ingress policing and the egress policer of vhost-user ports, with the roles swapped. One wire
//! for all of it; what the daemon counts is held against what OVS and the stations count.

use std::net::UdpSocket;
use std::ops::Sub;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::ovs::{Ovs, OvsConfig, PortConfig, Station};
use crate::support::tmp::random_bytes;

const PATIENCE: Duration = Duration::from_secs(30);

/// How long datagrams are sent for, and how many of them each millisecond: more than any rate here.
const SPAN: Duration = Duration::from_millis(300);
const EACH_MS: u64 = 8;

const DATAGRAM: usize = 1000;
/// Bits of Ethernet that carry one.
const FRAME_BITS: u64 = 8 * (14 + 20 + 8 + DATAGRAM as u64);

/// Two stations, each behind a bridge of OVS, and the ports `a` and `b` of the daemon between them.
struct Lan {
    daemon: Daemon,
    ovs: Ovs,
    settings: PathBuf,
    /// Where `left` sends from, and `right` receives.
    sockets: [UdpSocket; 2],
    right: Station,
    /// Datagrams sent so far.
    sent: u64,
}

/// Frames so far, or in one run.
#[derive(Debug, Clone, Copy)]
struct Frames {
    /// What OVS gave to port `a`.
    came: u64,
    /// What went on from there, and what its rates dropped.
    passed: u64,
    policed: u64,
    /// What OVS was given at port `b`, and what was dropped there.
    given: u64,
    withheld: u64,
    /// What came to the other station.
    arrived: u64,
}

impl Sub for Frames {
    type Output = Frames;

    fn sub(self, before: Frames) -> Frames {
        Frames {
            came: self.came - before.came,
            passed: self.passed - before.passed,
            policed: self.policed - before.policed,
            given: self.given - before.given,
            withheld: self.withheld - before.withheld,
            arrived: self.arrived - before.arrived,
        }
    }
}

/// What `number` says.
fn datagram(number: u64) -> Vec<u8> {
    let mut bytes = random_bytes(number + 1, DATAGRAM);
    bytes[..8].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// A socket of a station, which hears and says nothing but what the test sends.
fn alone(station: &Station, other: &Station) -> UdpSocket {
    let mac = other.netns.ok("cat /sys/class/net/eth0/address");
    let (mac, address) = (mac.trim(), &other.address);
    station.netns.ok(&format!(
        "echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6 && \
         ip neigh replace {address} lladdr {mac} dev eth0 nud permanent"
    ));
    let (own, to) = (format!("{}:9", station.address), format!("{address}:9"));
    let made = station.netns.spawn(move || {
        let socket = UdpSocket::bind(own)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        std::io::Result::Ok(socket)
    });
    made.join().expect("no panic").expect("a socket")
}

impl Lan {
    fn start() -> Lan {
        let ovs = Ovs::start(OvsConfig::default());
        let settings = ovs.socket("settings").with_extension("toml");
        std::fs::write(&settings, text(&ovs, "", "")).expect("the settings");
        let config = settings.display().to_string();
        let daemon = Daemon::start(&["run", "--config", &config]);
        let side = |name: &str, address: &str| {
            let bridge = format!("br-{name}");
            ovs.add_bridge(&bridge);
            ovs.add_front_end(&bridge, name, &port(name));
            ovs.add_station(&bridge, address, None)
        };
        let (left, right) = (side("a", "10.1.0.1"), side("b", "10.1.0.2"));
        left.pings(&right, "");
        let sockets = [alone(&left, &right), alone(&right, &left)];
        let lan = Lan {
            daemon,
            ovs,
            settings,
            sockets,
            right,
            sent: 0,
        };
        // What the stations had to say otherwise is through.
        lan.frames_since(None);
        lan
    }

    /// Writes the keys of both ports and has them read, which `wanted` is logged for.
    fn set(&self, a: &str, b: &str, wanted: &str) -> String {
        std::fs::write(&self.settings, text(&self.ovs, a, b)).expect("the settings");
        let position = self.daemon.log().len();
        self.daemon.signal(libc::SIGHUP);
        self.daemon.wait_log_after(position, wanted, PATIENCE)
    }

    /// Waits until every frame that OVS sent is accounted for, by everybody alike; since `before`.
    fn frames_since(&self, before: Option<Frames>) -> Frames {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let count = |port: &str, name: &str| self.daemon.counter(port, name);
            let line = "cat /sys/class/net/eth0/statistics/rx_packets";
            let now = Frames {
                came: self.ovs.sent("br-a", "a"),
                passed: count("a", "tx_frames"),
                policed: count("a", "tx_drop_policed"),
                given: count("b", "rx_frames"),
                withheld: count("b", "rx_drop_policed"),
                arrived: self.right.netns.ok(line).trim().parse().expect("a count"),
            };
            let Some(before) = before else { return now };
            let run = now - before;
            if run.came == run.passed + run.policed && [run.given, run.arrived] == [run.passed; 2] {
                return run;
            }
            assert!(Instant::now() < deadline, "frames are missing: {run:?}");
        }
    }

    /// Sends datagrams for [`SPAN`]; those that arrive are whole and in order. Returns what became
    /// of them, and how long it took until that was known.
    fn flood(&mut self) -> (Frames, Duration) {
        let before = self.frames_since(None);
        let (start, ended) = (Instant::now(), AtomicBool::new(false));
        let [from, to] = &self.sockets;
        let first = self.sent;
        let mut next = first;
        let (run, took) = std::thread::scope(|scope| {
            let heard = scope.spawn(|| hear(to, first, &ended));
            let end = End(&ended);
            while start.elapsed() < SPAN {
                // Who slept for longer makes up for it.
                let due = u64::try_from(start.elapsed().as_millis()).expect("a short time");
                while next < first + due * EACH_MS {
                    from.send(&datagram(next)).expect("it is sent");
                    next += 1;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let run = self.frames_since(Some(before));
            let took = start.elapsed();
            drop(end);
            let heard = heard.join().expect("what was heard is right");
            assert!(heard > 0 && heard <= run.arrived, "{heard} heard: {run:?}");
            (run, took)
        });
        self.sent = next;
        assert!(run.came > 1000, "hardly any load: {run:?}");
        (run, took)
    }

    /// Sends, and nothing is policed.
    fn all_passes(&mut self) {
        let (run, _) = self.flood();
        assert_eq!([run.policed, run.withheld], [0, 0], "{run:?}");
    }

    /// Sends more than `rate` allows, and what passes is `rate`, with what `burst` saves up. The
    /// rate is one of what port `a` may send, or with `at_b` of what `b` is given.
    fn is_held(&mut self, rate: Rate, burst: Duration, at_b: bool) {
        let (run, took) = self.flood();
        let seconds = (took + burst).as_secs_f64();
        let most = rate.frames(seconds) + 1.0;
        // A worker that gets no core for longer than the burst loses what it could not save.
        let sure = if burst < SPAN / 4 { 0.4 } else { 0.8 };
        let least = rate.frames(SPAN.as_secs_f64()) * sure;
        let passed = f64::from(u32::try_from(run.passed).expect("a small count"));
        assert!(
            (least..=most).contains(&passed),
            "{least} to {most} may pass at {rate:?} in {took:?}: {run:?}"
        );
        assert!(run.policed > 0, "{run:?}");
        // What the receiver may not have is lost to both.
        let withheld = if at_b { run.policed } else { 0 };
        assert_eq!(run.withheld, withheld, "{run:?}");
    }
}

/// Ends the listening, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Takes what comes until it has `ended`; returns how many datagrams there were.
fn hear(socket: &UdpSocket, mut next: u64, ended: &AtomicBool) -> u64 {
    let (mut heard, mut bytes) = (0, [0; DATAGRAM + 1]);
    loop {
        let Ok(length) = socket.recv(&mut bytes) else {
            if ended.load(Ordering::Relaxed) {
                return heard;
            }
            continue;
        };
        let got = &bytes[..length];
        let number = u64::from_ne_bytes(got[..8].try_into().expect("eight bytes"));
        assert!(number >= next, "{number} came after {next}");
        assert!(got == datagram(number), "datagram {number} differs");
        next = number + 1;
        heard += 1;
    }
}

#[derive(Debug, Clone, Copy)]
enum Rate {
    Frames(u32),
    Bits(u32),
}

impl Rate {
    /// So many in that time.
    fn frames(self, seconds: f64) -> f64 {
        match self {
            Rate::Frames(rate) => f64::from(rate) * seconds,
            Rate::Bits(rate) => {
                let bits = u32::try_from(FRAME_BITS).expect("a small number");
                f64::from(rate) * seconds / f64::from(bits)
            }
        }
    }
}

/// The ends have different ring formats.
fn port(name: &str) -> PortConfig {
    PortConfig {
        packed: name == "a",
        queues: 1,
        listens: false,
        mtu: 1500,
    }
}

/// The daemon's settings, with more keys for each port.
fn text(ovs: &Ovs, a: &str, b: &str) -> String {
    let net = |name: &str, keys: &str| {
        let socket = ovs.socket(name);
        let socket = socket.display();
        format!("[[net]]\nname = \"{name}\"\nsocket = \"{socket}\"\n{keys}\n")
    };
    // OVS polls while it is not asleep: no frame is lost for want of buffers.
    let a = format!("link = \"wire:b\"\nhold_us = 50000\n{a}");
    format!("[engine]\ncores = [1]\n{}{}", net("a", &a), net("b", b))
}

/// Ingress policing and QoS: created, changed while frames come, refused when it makes no sense,
/// kept when the front-end's port is another, deleted.
#[test]
fn what_ovs_sends_and_is_given_is_policed() {
    const SAVED: Duration = Duration::from_millis(100);
    let mut lan = Lan::start();
    lan.all_passes();
    for (keys, rate, shown) in [
        ("ingress_frames = 1000", Rate::Frames(1000), "1000 frames/s"),
        (
            "ingress_frames = \"3k\"",
            Rate::Frames(3000),
            "3000 frames/s",
        ),
        (
            "ingress_bits = \"8M\"",
            Rate::Bits(8_000_000),
            "8000000 bit/s",
        ),
        (
            "ingress_bits = 24_000_000\ningress_frames = \"1G\"",
            Rate::Bits(24_000_000),
            "1000000000 frames/s, 24000000 bit/s",
        ),
    ] {
        let keys = format!("{keys}\nrate_burst = \"100ms\"");
        let shown = format!("net a: other rates: ingress {shown}, burst 100ms; egress unlimited");
        lan.set(&keys, "", &shown);
        lan.is_held(rate, SAVED, false);
    }
    // OVS takes what is wrong into its database, tells of an error and polices nothing. Here it is
    // refused, and what was set holds.
    for (key, value, expected) in [
        ("ingress_bits", "0", "a rate in a second such as 2500"),
        ("ingress_bits", "-8", "a rate in a second such as 2500"),
        ("ingress_frames", "0", "a rate in a second such as 2500"),
        ("egress_frames", "1.5k", "a rate in a second such as 2500"),
        ("egress_bits", "", "a rate in a second such as 2500"),
        ("rate_burst", "0", "a duration from 1ms to 1s"),
        ("rate_burst", "", "expected a duration"),
    ] {
        let keys = format!("{key} = \"{value}\"");
        let line = lan.set(&keys, "", "the settings stay as they are: ");
        let named = format!("net a: {key} = \"{value}\": ");
        assert!(line.contains(&named) && line.contains(expected), "{line}");
    }
    lan.is_held(Rate::Bits(24_000_000), SAVED, false);
    // Without a burst there is one; without a rate a burst is none.
    lan.set("ingress_frames = 2000", "", "net a: other rates");
    lan.is_held(Rate::Frames(2000), Duration::from_millis(10), false);
    // The rate is the daemon's port's, whoever its front-end is.
    let position = lan.daemon.log().len();
    lan.ovs.del_front_end("a");
    let ended = "net a: session ended";
    lan.daemon.wait_log_after(position, ended, PATIENCE);
    lan.ovs.add_front_end("br-a", "a", &port("a"));
    let started = "negotiated device=a";
    lan.daemon.wait_log_after(position, started, PATIENCE);
    lan.is_held(Rate::Frames(2000), Duration::from_millis(10), false);
    lan.set("rate_burst = \"100ms\"", "", "net a: other rates");
    lan.all_passes();
    for (keys, rate) in [
        ("egress_frames = 1500", Rate::Frames(1500)),
        ("egress_bits = \"16M\"", Rate::Bits(16_000_000)),
    ] {
        let keys = format!("{keys}\nrate_burst = \"100ms\"");
        lan.set("", &keys, "net b: other rates: ingress unlimited; egress 1");
        lan.is_held(rate, SAVED, true);
    }
    let shown = "net b: other rates: ingress unlimited; egress unlimited";
    lan.set("", "", shown);
    lan.all_passes();
    let (status, log) = lan.daemon.stop();
    assert!(status.success(), "{log}");
}
