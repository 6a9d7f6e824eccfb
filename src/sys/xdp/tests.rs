//! Interfaces of the running kernel, in a network namespace of the test's own.

use std::process::Command;

use super::*;
use crate::sys::testnet::{drop_capabilities, in_private_netns, ip};

/// Two interfaces on a cable, `xa` and `xb`, with `queues` queues each, up.
fn cable(queues: u16) {
    let ends = format!("numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add xa {ends} type veth peer name xb {ends}"));
    ip("link set xa up");
    ip("link set xb up");
}

/// What `ip` says about `name`.
fn link(name: &str) -> String {
    let mut command = Command::new("ip");
    let output = command.args(["-d", "link", "show", name]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn error(name: &str, queues: u16, mtu: Option<u16>) -> String {
    Xdp::open(name, queues, mtu).unwrap_err().to_string()
}

#[test]
fn a_program_runs_in_a_driver_that_has_a_place_for_it_and_goes_with_the_last_descriptor() {
    in_private_netns(|| {
        cable(2);
        let before = link("xa");
        assert!(!before.contains("prog/xdp"), "{before}");
        let xdp = Xdp::open("xa", 2, Some(1500)).unwrap();
        assert_eq!((xdp.name(), xdp.mode()), ("xa", Mode::Native));
        // A cable between two interfaces of the kernel has no memory to be read by anything else.
        assert!(!xdp.is_zero_copy());
        assert_eq!(xdp.frame_max(), 1522);
        assert_eq!(xdp.statistics(), Statistics::default());
        let during = link("xa");
        for word in ["xdp", "prog/xdp", "promiscuity 1"] {
            assert!(during.contains(word), "no `{word}` in {during}");
        }
        assert!(!during.contains("xdpgeneric"), "{during}");
        let sockets: Vec<_> = (0..2).map(|_| xdp.take_socket().unwrap()).collect();
        assert!(xdp.take_socket().is_none());
        drop((xdp, sockets));
        // Programs that other tests start have our descriptors until they run.
        let start = Instant::now();
        let mut after = link("xa");
        while after.contains("prog/xdp") && start.elapsed() < RELEASED_WITHIN {
            after = link("xa");
        }
        assert!(!after.contains("prog/xdp"), "{after}");
        assert!(after.contains("promiscuity 0"), "{after}");
    });
}

#[test]
fn a_program_runs_in_the_stack_where_the_driver_has_no_place_for_it() {
    in_private_netns(|| {
        cable(1);
        ip("link add link xa name mv type macvlan mode passthru");
        ip("link set mv up");
        let xdp = Xdp::open("mv", 1, None).unwrap();
        assert_eq!(xdp.mode(), Mode::Generic);
        assert!(link("mv").contains("xdpgeneric"), "{}", link("mv"));
    });
}

#[test]
fn what_can_not_be_used_is_named_with_its_reason() {
    in_private_netns(|| {
        cable(2);
        let name = "a-name-of-16-byt";
        assert_eq!(
            error(name, 1, None),
            format!("xdp `{name}`: not a name for an interface (it has more than 15 bytes)")
        );
        assert_eq!(
            error("none0", 1, None),
            "xdp `none0`: there is no such interface"
        );
        assert_eq!(
            error("xa", 3, None),
            "xdp `xa`: 3 queues asked for, the interface has 2"
        );
        assert_eq!(
            error("xa", 0, None),
            "xdp `xa`: 0 queues asked for, the interface has 2"
        );
        assert_eq!(
            error("xa", 1, Some(9000)),
            "xdp `xa`: mtu 9000 asked for, the interface has 1500"
        );
        let first = Xdp::open("xa", 1, None).unwrap();
        assert_eq!(
            error("xa", 1, None),
            "xdp `xa`: can't attach a program: another XDP program or AF_XDP socket has the \
             interface"
        );
        drop(first);
        drop(Xdp::open("xa", 1, None).unwrap());
        drop_capabilities();
        let refused = error("xa", 1, None);
        assert!(
            refused.starts_with("xdp `xa`: no permission to "),
            "{refused}"
        );
    });
}

/// A driver that works in our memory and does not know the request would send half a checksum.
#[test]
fn checksums_are_left_to_who_makes_them() {
    use TxCsum::{Auto, Offload, Software};
    for (tx_csum, announced, copying, zero_copy) in [
        (Auto, false, false, false),
        (Auto, true, false, true),
        (Offload, false, true, false),
        (Offload, true, true, true),
        (Software, false, false, false),
        (Software, true, false, false),
    ] {
        let found = Found {
            name: String::new(),
            index: 0,
            queues: 1,
            longest: 1522,
            tx_csum,
            announced,
        };
        let left = [false, true].map(|zero_copy| found.leaves_csum(zero_copy));
        assert_eq!(left, [copying, zero_copy], "{tx_csum:?}, {announced}");
        assert_eq!(found.headroom() == 64, copying || zero_copy);
    }
}

/// A cable of the kernel copies, whatever its driver says.
#[test]
fn what_a_driver_announces_is_used_without_copies_alone() {
    in_private_netns(|| {
        cable(1);
        for (tx_csum, announced, leaves) in [
            (TxCsum::Auto, false, false),
            (TxCsum::Auto, true, false),
            (TxCsum::Offload, false, true),
            (TxCsum::Software, true, false),
        ] {
            let found = Found {
                tx_csum,
                announced,
                ..find("xa", 1, None).unwrap()
            };
            let xdp = Xdp::with_own(&found, 0).unwrap();
            let socket = xdp.take_socket().unwrap();
            assert_eq!(socket.leaves_csum(), leaves, "{tx_csum:?}");
            assert_eq!(socket.chunk_bytes(), CHUNK - found.headroom());
        }
    });
}

/// Before Linux 6.11 the kernel refuses room of any length as this one does a strange length.
#[test]
fn a_kernel_that_takes_no_metadata_gets_frames_without() {
    for (headroom, has) in [(64, true), (60, false), (256, false), (0, false)] {
        let fd = socket::create().unwrap();
        let mut socket = XdpSocket::new(fd, socket::ENTRIES_MIN, false, headroom).unwrap();
        socket.leave_csum();
        assert_eq!(socket.leaves_csum(), has, "{headroom}");
        assert_eq!(socket.chunk_bytes(), if has { 1984 } else { CHUNK });
    }
}
