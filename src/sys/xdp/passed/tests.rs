//! Sockets and maps that were passed, as a process without capabilities meets them. That they move
//! frames is shown by the daemon itself (tests/xdp.rs).

use std::fs::File;
use std::net::UdpSocket;

use super::*;
use crate::sys::socket::pass_on;
use crate::sys::testnet::{become_nobody_else, in_private_netns, ip};
use crate::sys::xdp::Held;
use crate::sys::xdp::socket;

fn cable() {
    ip("link add xa numrxqueues 2 numtxqueues 2 type veth peer name xb");
    ip("link set xa up");
    ip("link set xb up");
}

/// What exec would make of a descriptor.
fn passed(fd: impl Into<OwnedFd>) -> OwnedFd {
    let fd = fd.into();
    pass_on(&fd).unwrap();
    fd
}

fn number(fd: &OwnedFd) -> PassedFd {
    PassedFd::Number(fd.as_raw_fd())
}

fn place(sockets: &[&OwnedFd], map: Option<&OwnedFd>) -> XdpPlace {
    XdpPlace {
        interface: "xa".into(),
        passed: Some(PassedXdp {
            sockets: sockets.iter().copied().map(number).collect(),
            map: map.map(number),
        }),
        ..XdpPlace::default()
    }
}

fn error(place: &XdpPlace) -> String {
    Xdp::open_at(place, 16, None).unwrap_err().to_string()
}

/// What the helper makes of `xa`, and keeps.
fn handed(queues: u16) -> (Vec<OwnedFd>, OwnedFd, Option<Held>) {
    let found = find("xa", queues, None).unwrap();
    let (sockets, means) = means(&found).unwrap();
    let sockets = sockets.into_iter().map(passed).collect();
    (sockets, passed(means.map.unwrap().into_fd()), means.held)
}

#[test]
fn without_capabilities_a_socket_that_was_passed_is_bound_and_put_into_the_map() {
    in_private_netns(|| {
        cable();
        // As much memory as the usual limit is, for one socket.
        let (sockets, map, _held) = handed(1);
        become_nobody_else();
        let xdp = Xdp::open_at(&place(&[&sockets[0]], Some(&map)), 1, Some(1500)).unwrap();
        assert_eq!((xdp.name(), xdp.mode()), ("xa", Mode::Native));
        assert!(!xdp.is_zero_copy());
        for queue in [0, 1, 1, 0] {
            xdp.set_receiving(queue, true).unwrap();
            xdp.set_receiving(queue, false).unwrap();
        }
        Xdp::open("xa", 1, None).unwrap_err();
    });
}

#[test]
fn there_are_as_many_queues_as_sockets_and_they_are_taken_over_once() {
    in_private_netns(|| {
        cable();
        let (sockets, map, _held) = handed(2);
        let place = place(&[&sockets[0], &sockets[1]], Some(&map));
        let [first, second] = [&sockets[0], &sockets[1]].map(|fd| fd.as_raw_fd());
        let map = map.as_raw_fd();
        assert_eq!(
            place.to_string(),
            format!("xdp:xa:fd={first}+{second}:map={map}")
        );
        let xdp = Xdp::open_at(&place, 16, None).unwrap();
        let both = [xdp.take_socket(), xdp.take_socket()];
        assert!(both.iter().all(Option::is_some) && xdp.take_socket().is_none());
        assert_eq!(
            error(&place),
            format!(
                "xdp `xa`: the file descriptor {first} was not passed to this process, or is in \
                 use already"
            )
        );
    });
}

#[test]
fn a_program_is_found_where_it_runs() {
    in_private_netns(|| {
        cable();
        ip("link add link xa name mv type macvlan mode passthru");
        for (name, mode) in [("xa", Mode::Native), ("mv", Mode::Generic)] {
            let found = find(name, 1, None).unwrap();
            assert_eq!(attached::mode(found.index).unwrap(), None);
            let (_sockets, means) = means(&found).unwrap();
            assert_eq!(means.mode, mode);
            assert_eq!(attached::mode(found.index).unwrap(), Some(mode));
            drop(means);
            ip("link del mv");
            ip("link add link xb name mv type macvlan mode passthru");
        }
        attached::mode(12345).unwrap_err();
    });
}

#[test]
fn descriptors_that_can_not_be_used_are_named_with_their_reason() {
    in_private_netns(|| {
        cable();
        let refused = |place: &XdpPlace, fd: &OwnedFd, reason: &str| {
            let fd = fd.as_raw_fd();
            assert_eq!(
                error(place),
                format!("xdp `xa`: the file descriptor {fd} {reason}")
            );
        };
        let socket = passed(socket::create().unwrap());
        let file = passed(File::open("/dev/null").unwrap());
        let udp = passed(UdpSocket::bind("0.0.0.0:0").unwrap());
        for other in [&file, &udp] {
            refused(
                &place(&[&socket, other], None),
                other,
                "is not an AF_XDP socket",
            );
        }
        let ours = socket::create().unwrap();
        refused(
            &place(&[&ours], None),
            &ours,
            "was not passed to this process, or is in use already",
        );
        let mut closed = place(&[], None);
        closed.passed.as_mut().unwrap().sockets = vec![PassedFd::Number(1_000_000)];
        assert_eq!(
            error(&closed),
            "xdp `xa`: the file descriptor 1000000 is not open"
        );
        let used = passed(socket::create().unwrap());
        let owner =
            XdpSocket::new(used.try_clone().unwrap(), socket::ENTRIES_MIN, false, 0).unwrap();
        refused(
            &place(&[&used], None),
            &used,
            "is in use: an AF_XDP socket must be a new one",
        );
        drop(owner);
        for other in [&file, &udp, &used] {
            refused(&place(&[&socket], Some(other)), other, "is not an XSKMAP");
        }
        let small = passed(XskMap::new(1).unwrap().into_fd());
        let second = passed(socket::create().unwrap());
        refused(
            &place(&[&socket, &second], Some(&small)),
            &small,
            "is an XSKMAP for 1 queues, fewer than there are sockets",
        );
        let third = passed(socket::create().unwrap());
        assert_eq!(
            error(&place(&[&socket, &second, &third], None)),
            "xdp `xa`: 3 queues asked for, the interface has 2"
        );
        // None of that has used the sockets up.
        let xdp = Xdp::open_at(&place(&[&socket, &second], None), 2, None).unwrap();
        xdp.set_receiving(0, true).unwrap();
    });
}

/// That a name is found is shown by the daemon itself (tests/xdp.rs): it is in its environment.
#[test]
fn a_name_that_nobody_has_told_is_named() {
    in_private_netns(|| {
        cable();
        let mut named = place(&[], None);
        named.passed.as_mut().unwrap().sockets = vec![PassedFd::Name("xsk".into())];
        assert_eq!(error(&named), "xdp `xa`: the file descriptor named `xsk`");
        let passed = named.passed.as_mut().unwrap();
        passed.sockets.push(PassedFd::Name("b".into()));
        passed.map = Some(PassedFd::Number(7));
        assert_eq!(named.to_string(), "xdp:xa:fdname=xsk+b:map=7");
        named.passed.as_mut().unwrap().map = Some(PassedFd::Name("m".into()));
        assert_eq!(named.to_string(), "xdp:xa:fdname=xsk+b:mapname=m");
    });
}

#[test]
fn a_socket_of_another_network_namespace_is_refused() {
    in_private_netns(|| {
        let elsewhere = passed(socket::create().unwrap());
        let fd = elsewhere.as_raw_fd();
        let place = place(&[&elsewhere], None);
        in_private_netns(move || {
            cable();
            let message = format!(
                "xdp `xa`: the file descriptor {fd} is a socket of another network namespace"
            );
            assert_eq!(error(&place), message);
        });
    });
}
