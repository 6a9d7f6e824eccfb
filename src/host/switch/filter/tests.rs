//! What passes a filter, and every way to claim what is another's.

use super::*;

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const NONE: &str = "::";
const ADDRESS: &str = "fd00::7";
const LOCAL: &str = "fe80::7";

fn filter() -> Filter {
    let ip = ["10.0.0.7", ADDRESS, LOCAL];
    Filter {
        mac: vec![OWN],
        ip: ip.iter().map(|ip| ip.parse().unwrap()).collect(),
    }
}

fn allows(packet: &[u8]) -> bool {
    filter().allows(OWN, packet)
}

fn put(mut packet: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

/// From 10.0.0.`last` or, with 0, from no address, with `options` words of options.
fn ipv4(last: u8, options: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![
        8,
        0,
        0x45 + options,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        64,
        protocol,
        0,
        0,
    ];
    packet.extend(if last == 0 { [0; 4] } else { [10, 0, 0, last] });
    packet.extend([255; 4]);
    packet.extend(vec![1; usize::from(options) * 4]);
    packet.extend(payload);
    packet
}

fn address(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

/// With `headers` before what is in it: of each its number and what follows its own "next".
fn ipv6(source: &str, headers: &[(u8, &[u8])], upper: u8, payload: &[u8]) -> Vec<u8> {
    let numbers: Vec<u8> = headers.iter().map(|(number, _)| *number).collect();
    let mut next = numbers.into_iter().chain([upper]);
    let mut body = Vec::new();
    let first = next.next().unwrap();
    for (number, rest) in next.zip(headers.iter().map(|(_, rest)| rest)) {
        body.push(number);
        body.extend(*rest);
    }
    body.extend(payload);
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0, length[0], length[1], first, 255];
    packet.extend(address(source));
    packet.extend(address("ff02::1"));
    packet.extend(body);
    packet
}

/// A message of neighbour discovery.
fn message(kind: u8, target: Option<&str>, options: &[(u8, [u8; 6])]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.map(address).into_iter().flatten());
    for (option, address) in options {
        message.extend([*option, 1]);
        message.extend(address);
    }
    message
}

fn discovery(source: &str, message: &[u8]) -> Vec<u8> {
    ipv6(source, &[], ICMPV6, message)
}

#[test]
fn only_own_addresses_pass() {
    assert!(allows(&ipv4(7, 0, 6, &[0; 20])));
    assert!(!allows(&ipv4(8, 0, 6, &[0; 20])));
    assert!(!filter().allows(OTHER, &ipv4(7, 0, 6, &[0; 20])));
    assert!(allows(&ipv6(ADDRESS, &[], 6, &[0; 20])));
    assert!(!allows(&ipv6("fd00::8", &[], 6, &[0; 20])));
    assert!(!allows(&[0x88, 0xcc, 0, 0]), "LLDP is not IP");
    assert!(!allows(&ipv4(7, 0, 6, &[])[..10]), "cut short");
    assert!(!allows(&ipv6(ADDRESS, &[], 6, &[])[..20]), "cut short");
}

#[test]
fn who_has_no_address_may_ask_for_one_and_say_nothing_else() {
    let dhcp = [0, 68, 0, 67, 0, 8, 0, 0];
    assert!(allows(&ipv4(0, 0, UDP, &dhcp)));
    assert!(allows(&ipv4(0, 10, UDP, &dhcp)), "behind options");
    assert!(
        !allows(&ipv4(0, 0, UDP, &[0, 67, 0, 68, 0, 8, 0, 0])),
        "a server"
    );
    assert!(!allows(&ipv4(0, 0, UDP, &[0, 53, 0, 67, 0, 8, 0, 0])));
    assert!(!allows(&ipv4(0, 0, 6, &dhcp)), "not UDP");
    for fragment in [[0x20, 0], [0, 1]] {
        let piece = put(ipv4(0, 0, UDP, &dhcp), 8, &fragment);
        assert!(!allows(&piece), "{fragment:?}");
    }
    assert!(!allows(&ipv4(0, 0, UDP, &dhcp[..3])), "cut short");
    assert!(!allows(&ipv6(NONE, &[], UDP, &[2, 34, 2, 35])));
    assert!(!allows(&ipv6(NONE, &[], ICMPV6, &[128, 0, 0, 0])), "a ping");
}

#[test]
fn arp_tells_own_addresses_and_nothing_else() {
    let arp = |operation, own: [u8; 6], sender: u8, target: u8| {
        let mut packet = [&TYPE_ARP[..], &ARP_KINDS, &[0, operation], &own].concat();
        packet.extend(if sender == 0 {
            [0; 4]
        } else {
            [10, 0, 0, sender]
        });
        packet.extend([0; 6]);
        packet.extend([10, 0, 0, target]);
        packet
    };
    assert!(allows(&arp(1, OWN, 7, 9)));
    assert!(allows(&arp(2, OWN, 7, 9)));
    assert!(!allows(&arp(2, OWN, 8, 9)));
    assert!(!allows(&arp(1, OTHER, 7, 9)), "another's hardware address");
    assert!(allows(&arp(1, OWN, 0, 7)), "is it free?");
    assert!(!allows(&arp(1, OWN, 0, 8)), "another's");
    assert!(!allows(&arp(2, OWN, 0, 7)), "an answer from nobody");
    assert!(!allows(&put(arp(1, OWN, 7, 9), 6, &[8])), "lengths lie");
    assert!(!allows(&arp(1, OWN, 7, 9)[..28]), "cut short");
}

#[test]
fn neighbours_tell_own_addresses_and_nothing_else() {
    let (own, other) = ((TARGET_LINK, OWN), (TARGET_LINK, OTHER));
    let advertise = |target, options: &[_]| message(ADVERTISEMENT, Some(target), options);
    let solicit = |target, options: &[_]| message(SOLICITATION, Some(target), options);
    let own_source = (SOURCE_LINK, OWN);
    for (source, message, passes) in [
        (ADDRESS, advertise(ADDRESS, &[own]), true),
        (LOCAL, advertise(ADDRESS, &[own]), true),
        (ADDRESS, advertise(ADDRESS, &[]), true),
        (ADDRESS, advertise("fd00::8", &[own]), false),
        (ADDRESS, advertise("fd00::8", &[]), false),
        (ADDRESS, advertise(ADDRESS, &[other]), false),
        (ADDRESS, advertise(ADDRESS, &[own, other]), false),
        (ADDRESS, advertise(ADDRESS, &[(14, OTHER), own]), true),
        (ADDRESS, advertise(ADDRESS, &[(14, OWN), other]), false),
        (ADDRESS, solicit("fd00::1", &[own_source]), true),
        (ADDRESS, solicit("fd00::1", &[(SOURCE_LINK, OTHER)]), false),
        (NONE, solicit(ADDRESS, &[]), true),
        (NONE, solicit("fd00::8", &[]), false),
        (NONE, advertise(ADDRESS, &[own]), false),
        (
            LOCAL,
            message(ROUTER_SOLICITATION, None, &[own_source]),
            true,
        ),
        (NONE, message(ROUTER_SOLICITATION, None, &[]), true),
        (
            LOCAL,
            message(ROUTER_SOLICITATION, None, &[(1, OTHER)]),
            false,
        ),
        (LOCAL, message(ROUTER_ADVERTISEMENT, None, &[]), false),
        (LOCAL, message(REDIRECT, Some(ADDRESS), &[]), false),
    ] {
        let packet = discovery(source, &message);
        assert_eq!(allows(&packet), passes, "{source}: {message:02x?}");
        // An option that has no end, or is longer than an address, tells nobody what it holds.
        for units in [0, 2] {
            if passes && message.len() == 32 {
                let wrong = put(packet.clone(), 2 + 40 + 24 + 1, &[units]);
                assert!(!allows(&wrong), "{units}: {message:02x?}");
            }
        }
        // What the receiver reads and we can't see.
        assert!(!allows(&packet[..packet.len() - 1]), "cut short");
    }
}

#[test]
fn neighbours_are_not_believed_behind_other_headers() {
    let advertisement = message(ADVERTISEMENT, Some(ADDRESS), &[(TARGET_LINK, OWN)]);
    let padding = [0, 1, 4, 0, 0, 0, 0];
    let (first, later): (&[u8], &[u8]) = (&[0, 0, 1, 0, 0, 0, 1], &[0, 1, 1, 0, 0, 0, 1]);
    let signed = [&[1][..], &[0; 10]].concat();
    for (header, rest) in [
        (HOP_BY_HOP, &padding[..]),
        (DESTINATION, &padding),
        (ROUTING, &padding),
        (FRAGMENT, first),
        (AUTHENTICATION, &signed),
    ] {
        for headers in [
            vec![(header, rest)],
            vec![(header, rest), (DESTINATION, &padding)],
        ] {
            let hidden = ipv6(ADDRESS, &headers, ICMPV6, &advertisement);
            assert!(!allows(&hidden), "{headers:?}");
            let ping = ipv6(ADDRESS, &headers, ICMPV6, &[128, 0, 0, 0, 0, 0, 0, 0]);
            assert!(allows(&ping), "{headers:?}");
            let cut = 2 + 40 + rest.len();
            assert!(!allows(&ping[..cut]), "{headers:?}, cut short");
        }
    }
    // Of a packet in pieces the first shows what it is.
    let piece = ipv6(ADDRESS, &[(FRAGMENT, later)], ICMPV6, &advertisement);
    assert!(allows(&piece));
    let report = |source| ipv6(source, &[(HOP_BY_HOP, &padding)], ICMPV6, &[143, 0, 0, 0]);
    assert!(allows(&report(ADDRESS)) && allows(&report(NONE)));
    assert!(!allows(&report("fd00::8")));
    let piece = ipv6(NONE, &[(FRAGMENT, later)], ICMPV6, &advertisement);
    assert!(!allows(&piece), "from nobody");
}

/// Whatever comes of a checksum, and wherever its sender wants it, what was allowed still is.
#[test]
fn no_checksum_makes_an_allowed_packet_one_that_is_not() {
    let dhcp = [0, 68, 0, 67, 0, 8, 0, 0, 1, 2, 3, 4];
    let arp = [
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1][..],
        &OWN,
        &[10, 0, 0, 7],
        &[0; 6],
        &[10, 0, 0, 9],
    ];
    let padding: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let advertisement = message(ADVERTISEMENT, Some(ADDRESS), &[(TARGET_LINK, OWN)]);
    // With where the checksum of what is in it usually is, if it has one.
    let packets = [
        (ipv4(7, 0, 6, &[0; 20]), Some(38)),
        (ipv4(7, 3, UDP, &dhcp), Some(40)),
        (ipv4(0, 0, UDP, &dhcp), Some(28)),
        (put(ipv4(7, 0, UDP, &dhcp), 2, &[0x40]), None),
        (put(ipv4(7, 0, UDP, &dhcp), 2, &[0x43]), None),
        (arp.concat(), None),
        (ipv6(ADDRESS, &[], 6, &[0; 20]), Some(58)),
        (
            ipv6(ADDRESS, &[(DESTINATION, padding)], UDP, &dhcp),
            Some(56),
        ),
        (discovery(ADDRESS, &advertisement), Some(44)),
        (ipv6(NONE, &[], ICMPV6, &[143, 0, 0, 0, 0, 0]), Some(44)),
    ];
    for (packet, usual) in packets {
        assert!(allows(&packet), "{packet:x?}");
        let may = |at: usize| filter().lets_be_written(&packet, at + 2);
        assert!(usual.is_none_or(may), "{packet:x?}");
        for at in (0..packet.len() - 1).filter(|&at| may(at)) {
            for value in [[0, 0], [0xff, 0xff], [0, 136], [136, 0], [44, 44], [1, 2]] {
                let written = put(packet.clone(), at, &value);
                assert!(allows(&written), "{at}: {value:?} in {packet:x?}");
            }
        }
        let (past, most) = (packet.len(), usize::from(u16::MAX) * 2);
        assert_eq!(may(past), may(most), "{packet:x?}");
    }
    assert!(Filter::default().lets_be_written(&[8, 6], 2));
}

#[test]
fn without_lists_all_pass() {
    assert!(Filter::default().allows([9; 6], &[]));
}
