//! Taps that were passed, macvtaps, and taps in another namespace.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::*;
use crate::sys::socket::pass_on;

/// A named network namespace, removed at the end.
struct Netns(String);

impl Netns {
    fn new() -> Netns {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        let name = format!("vrtap{}-{number}", std::process::id());
        ip(&format!("netns add {name}"));
        Netns(name)
    }

    /// What `ip link` says about `name` in it.
    fn link(&self, name: &str) -> Option<String> {
        let output = Command::new("ip")
            .args(["-n", &self.0, "-d", "link", "show", name])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then_some(text)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn open(source: TapSource, netns: Option<&str>, queues: u16) -> Result<Tap, TapError> {
    let place = TapPlace {
        persist: false,
        source,
        netns: netns.map(ToOwned::to_owned),
    };
    Tap::open_at(&place, queues, Some(1400))
}

/// Opens a tap again that was just let go of. A process that another test starts meanwhile has its
/// file for a moment, too.
fn reopen(source: &TapSource) -> Tap {
    let begun = std::time::Instant::now();
    loop {
        match open(source.clone(), None, 1) {
            Err(TapError::Busy { .. }) if begun.elapsed() < crate::sys::testnet::DEADLINE => {}
            opened => return opened.unwrap(),
        }
    }
}

fn named(name: &str) -> TapSource {
    TapSource::Name(name.to_owned())
}

#[test]
fn a_tap_is_made_in_the_namespace_that_was_named() {
    in_private_netns(|| {
        let blue = Netns::new();
        let path = format!("/run/netns/{}", blue.0);
        for netns in [blue.0.as_str(), &path] {
            let tap = open(named("t0"), Some(netns), 2).unwrap();
            assert!(tap.is_created());
            let text = blue.link("t0").unwrap();
            for word in ["mtu 1400", ",UP", "numqueues 2"] {
                assert!(text.contains(word), "no `{word}` in {text}");
            }
            // This thread stayed where it was.
            assert!(link("t0").is_none());
            // Its descriptors work from here.
            tap.set_attached(1, false).unwrap();
            assert!(blue.link("t0").unwrap().contains("numqueues 1"));
            tap.set_offload(TapOffloads {
                csum: true,
                ..TapOffloads::default()
            })
            .unwrap();
            drop(tap);
            wait_until_gone(|| blue.link("t0"));
        }
        ip(&format!("-n {} tuntap add dev one0 mode tap", blue.0));
        assert!(!open(named("one0"), Some(&blue.0), 1).unwrap().is_created());
        let error = open(named("one0"), Some(&blue.0), 2).unwrap_err();
        assert!(matches!(error, TapError::SingleQueue { .. }), "{error}");
    });
}

#[test]
fn a_namespace_that_cannot_be_entered_is_named() {
    in_private_netns(|| {
        let error = |netns: &str| open(named("t0"), Some(netns), 1).unwrap_err().to_string();
        assert_eq!(
            error("no-such"),
            "tap:t0: there is no network namespace \"/run/netns/no-such\" (`ip netns list` has \
             the names)"
        );
        assert_eq!(
            error("/etc/passwd"),
            "tap:t0: \"/etc/passwd\" is not a network namespace"
        );
        let blue = Netns::new();
        std::thread::scope(|scope| {
            let without_rights = scope.spawn(|| {
                crate::sys::testnet::drop_capabilities();
                error(&blue.0)
            });
            assert_eq!(
                without_rights.join().unwrap(),
                format!(
                    "tap:t0: no permission to enter the network namespace \"/run/netns/{}\" \
                     (CAP_SYS_ADMIN)",
                    blue.0
                )
            );
        });
        assert!(link("t0").is_none());
    });
}

/// What an exec would pass on.
fn passed(files: &[&File]) -> TapSource {
    for file in files {
        pass_on(*file).unwrap();
    }
    TapSource::Fds(files.iter().map(|file| file.as_raw_fd()).collect())
}

#[test]
fn queues_that_were_passed_are_taken_over_once() {
    in_private_netns(|| {
        let queues = [0, 0].map(|_| new_queue("in0", true, 0).unwrap());
        let source = passed(&[&queues[0], &queues[1]]);
        let tap = open(source.clone(), None, 2).unwrap();
        assert_eq!(
            (tap.name(), tap.queues(), tap.is_created()),
            ("in0", 2, false)
        );
        // Its owner cares for its MTU and its state.
        let text = link("in0").unwrap();
        assert!(text.contains("mtu 1500") && !text.contains(",UP"), "{text}");
        tap.set_attached(1, false).unwrap();
        tap.set_header_bytes(10).unwrap();
        assert!(link("in0").unwrap().contains("numqueues 1"));
        // SAFETY: no pointers.
        let flags = unsafe { libc::fcntl(tap.fds[1].as_raw_fd(), libc::F_GETFL) };
        assert_ne!(flags & libc::O_NONBLOCK, 0, "it never blocks");
        let fd = queues[0].as_raw_fd();
        assert_eq!(
            open(source, None, 2).unwrap_err().to_string(),
            format!(
                "tap: the file descriptor {fd} was not passed to this process, or is in use \
                 already"
            )
        );
    });
}

#[test]
fn descriptors_that_are_no_queues_of_one_tap_are_refused() {
    in_private_netns(|| {
        let error = |files: &[&File]| {
            let error = open(passed(files), None, 1).unwrap_err().to_string();
            // What was refused is still its owner's.
            for file in files {
                assert!(crate::sys::socket::is_inherited(file.as_raw_fd()).unwrap());
            }
            let last = files.last().unwrap().as_raw_fd();
            let start = format!("tap: the file descriptor {last} ");
            error.strip_prefix(&start).expect(&error).to_owned()
        };
        let null = File::open("/dev/null").unwrap();
        assert_eq!(error(&[&null]), "is not that of a tap");
        let alone = File::open(CLONE_DEVICE).unwrap();
        let without = "is that of a tap without an interface (TUNSETIFF)";
        assert_eq!(error(&[&alone]), without);
        let plain = File::open(CLONE_DEVICE).unwrap();
        let mut request = IfReq::with_flags("plain0", libc::IFF_TAP | libc::IFF_NO_PI);
        // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
        let answer =
            unsafe { libc::ioctl(plain.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(answer, 0);
        let bare = "is a queue of `plain0`, which was opened without IFF_VNET_HDR";
        assert_eq!(error(&[&plain]), bare);
        let [a, b] = ["a0", "b0"].map(|name| new_queue(name, false, 0).unwrap());
        let other = "is a queue of `b0`, but the one before it is of `a0`";
        assert_eq!(error(&[&a, &b]), other);
        let closed = TapSource::Fds(vec![9999]);
        assert_eq!(
            open(closed, None, 1).unwrap_err().to_string(),
            "tap: the file descriptor 9999 is not open"
        );
    });
}

/// A number for an interface that no other test has: /dev has one device for each number, whatever
/// the namespace.
fn index() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    1_000_000 + std::process::id() % 100_000 * 100 + NEXT.fetch_add(1, Relaxed)
}

#[test]
fn a_macvtap_has_as_many_queues_as_are_wanted() {
    in_private_netns(|| {
        ip("link add v0 type veth peer name v1");
        let index = index();
        ip(&format!(
            "link add link v0 name mv0 index {index} type macvtap mode bridge"
        ));
        let source = TapSource::Macvtap("mv0".to_owned());
        for queues in [1, 3] {
            let tap = open(source.clone(), None, queues).unwrap();
            assert_eq!(tap.queues(), usize::from(queues));
            assert!(!tap.is_created());
            assert!(link("mv0").unwrap().contains("mtu 1400"));
            // A header size for each queue.
            for bytes in [10, 12] {
                tap.set_header_bytes(bytes).unwrap();
                for fd in &tap.fds {
                    let mut size: libc::c_int = 0;
                    // SAFETY: TUNGETVNETHDRSZ writes one `int`.
                    let answer = unsafe {
                        libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut size)
                    };
                    assert_eq!((answer, usize::try_from(size).unwrap()), (0, bytes));
                }
            }
            for attached in [false, true, true] {
                tap.set_attached(queues - 1, attached).unwrap();
            }
        }
        assert!(link("mv0").is_some());
        // In its namespace, seen from elsewhere.
        let blue = Netns::new();
        ip(&format!("link set mv0 netns {}", blue.0));
        let there = open(source.clone(), Some(&blue.0), 1).unwrap();
        assert_eq!(there.name(), "mv0");
    });
}

#[test]
fn what_is_no_macvtap_is_refused() {
    in_private_netns(|| {
        ip("link add v0 type veth peer name v1");
        let error = |name: &str| {
            let error = open(TapSource::Macvtap(name.to_owned()), None, 1).unwrap_err();
            assert!(matches!(error, TapError::NoMacvtap { .. }), "{error}");
            error.to_string()
        };
        assert!(error("gone0").contains("`gone0`: there is no such interface"));
        let index = index();
        ip(&format!(
            "link add link v0 name vlan0 index {index} type macvlan"
        ));
        let message = error("vlan0");
        assert!(
            message.contains(&format!("it has no device /dev/tap{index}")),
            "{message}"
        );
    });
}

#[test]
fn what_the_kernel_drops_is_counted_from_the_start() {
    use crate::sys::testnet::{DEADLINE, PacketSocket, VNET_HEADER};
    in_private_netns(|| {
        // The stack says nothing by itself.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        ip("link add v0 type veth peer name v1");
        let index = index();
        ip(&format!(
            "link add link v0 name mv0 index {index} type macvtap mode passthru"
        ));
        ip("tuntap add dev old0 mode tap");
        for name in ["v0", "v1", "mv0", "old0"] {
            ip(&format!("link set {name} txqueuelen 5 up"));
        }
        let old = TapSource::Name("old0".to_owned());
        let macvtap = TapSource::Macvtap("mv0".to_owned());
        for (source, from) in [(&old, "old0"), (&macvtap, "v1")] {
            for sent in [20, 30] {
                let tap = reopen(source);
                let queue = tap.queue(0).unwrap();
                assert_eq!(tap.dropped(), Some(0), "{source}, {sent}");
                let socket = PacketSocket::bind(from);
                (0..sent).for_each(|_| socket.send(&[0; VNET_HEADER], &[2; 60]));
                let begun = std::time::Instant::now();
                while tap.dropped() != Some(sent - 5) {
                    assert!(begun.elapsed() < DEADLINE, "{source}: {:?}", tap.dropped());
                }
                assert_eq!(queue.discard_waiting(), 5, "{source}");
            }
        }
        let tap = Tap::open("other0", 1, None).unwrap();
        assert_eq!(tap.dropped(), None, "nobody has asked for it");
    });
}
