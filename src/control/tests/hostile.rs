//! Front-ends that don't keep to the protocol: refused, or closed, never a panic or a hang.

use std::io::Write;

use super::*;

/// Well-formed bodies for every request of the protocol, by code.
fn body_of(request: u32) -> Vec<u8> {
    match request {
        2 | 16 => VERSION_1.to_ne_bytes().to_vec(),
        5 => [state(1, 0), region(0, MIB)].concat(),
        6 | 38 | 37 => single(0, MIB),
        8 | 10 | 11 | 18 => state(0, 1),
        9 => addr(0),
        12..=14 | 20 | 39 => 0u64.to_ne_bytes().to_vec(),
        24 | 25 => [0u32.to_ne_bytes(), 4u32.to_ne_bytes(), [0; 4], [0; 4]].concat(),
        _ => Vec::new(),
    }
}

#[test]
fn every_message_first_and_twice_neither_panics_nor_hangs() {
    for request in 0..60u32 {
        for negotiated in [false, true] {
            let rig = Rig::new();
            if negotiated {
                rig.negotiate();
            }
            let file = memory(MIB);
            let fds: &[RawFd] = match request {
                5 | 37 | 38 | 12..=14 => &[file.as_file().as_raw_fd()],
                _ => &[],
            };
            for _ in 0..2 {
                // The session may be over already; then there is nobody to read this.
                let mut bytes = Vec::new();
                let body = body_of(request);
                for word in [request, 1 | NEED_REPLY, u32::try_from(body.len()).unwrap()] {
                    bytes.extend_from_slice(&word.to_ne_bytes());
                }
                bytes.extend_from_slice(&body);
                let _ = rig.socket.send_with_fds(&[&bytes[..]], fds);
            }
            let (_end, served, told) = rig.close();
            // The device serves the next one.
            let rig = Rig::on(served, told);
            assert_eq!(rig.negotiate(), TestDevice.features() | PROTOCOL);
        }
    }
}

#[test]
fn a_message_cut_short_ends_the_session_alone() {
    let body = addr(0);
    for cut in [1, 11, 12, 13, 12 + body.len() - 1] {
        let rig = Rig::new();
        rig.negotiate();
        let mut bytes = Vec::new();
        for word in [9, 1, u32::try_from(body.len()).unwrap()] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&body);
        (&rig.socket).write_all(&bytes[..cut]).unwrap();
        let (end, served, told) = rig.close();
        assert!(
            matches!(end, SessionEnd::Protocol { .. } | SessionEnd::Closed),
            "{cut}: {end}"
        );
        Rig::on(served, told).negotiate();
    }
}

#[test]
fn a_body_that_comes_in_pieces_is_one_message() {
    let rig = Rig::new();
    rig.negotiate();
    let mut bytes = Vec::new();
    for word in [8, 1 | NEED_REPLY, 8] {
        bytes.extend_from_slice(&u32::to_ne_bytes(word));
    }
    bytes.extend_from_slice(&state(0, 64));
    for byte in bytes {
        (&rig.socket).write_all(&[byte]).unwrap();
    }
    assert_eq!(rig.reply_u64(8), 0);
}

#[test]
fn an_oversized_body_or_a_wrong_version_ends_the_session() {
    let rig = Rig::new();
    let header = [3u32, 1, 1 << 20].map(u32::to_ne_bytes).concat();
    (&rig.socket).write_all(&header).unwrap();
    let end = rig.ended();
    assert!(end.to_string().contains("1048576"), "{end}");
    let rig = Rig::new();
    (&rig.socket)
        .write_all(&[3u32, 2, 0].map(u32::to_ne_bytes).concat())
        .unwrap();
    assert!(matches!(rig.ended(), SessionEnd::Protocol { .. }));
}

#[test]
fn bad_values_are_refused_and_the_session_goes_on() {
    let rig = Rig::new();
    rig.negotiate();
    let file = memory(MIB);
    let fd = file.as_file().as_raw_fd();
    let zero = 0u64.to_ne_bytes();
    let foreign = (1u64 << 50).to_ne_bytes();
    // With REPLY_ACK, or the parser stops acknowledging.
    let foreign_protocol = (1u64 << 50 | 1 << 3 | 1 << 15 | 1 << 16).to_ne_bytes();
    let not_eventfd = memory(8);
    let not_eventfd = [not_eventfd.as_file().as_raw_fd()];
    let cases: [(&str, u32, Vec<u8>, &[RawFd]); 12] = [
        ("a feature that was not offered", 2, foreign.to_vec(), &[]),
        (
            "a protocol feature that was not offered",
            16,
            foreign_protocol.to_vec(),
            &[],
        ),
        ("a region beyond its file", 37, single(0, 2 * MIB), &[fd]),
        ("a region of no size", 37, single(0, 0), &[fd]),
        (
            "a region that wraps",
            37,
            single(u64::MAX - 100, MIB),
            &[fd],
        ),
        ("a region that is not there", 38, single(0, MIB), &[fd]),
        ("a vring that is not there", 8, state(4, 64), &[]),
        ("a vring far off", 18, state(u32::MAX, 1), &[]),
        ("a ring of no size", 8, state(0, 0), &[]),
        ("a ring too large", 8, state(0, 32769), &[]),
        ("a kick that is no eventfd", 12, zero.to_vec(), &not_eventfd),
        (
            "a status of nine bits",
            39,
            256u64.to_ne_bytes().to_vec(),
            &[],
        ),
    ];
    for (what, request, body, fds) in cases {
        assert_ne!(rig.ask(request, &body, fds), 0, "{what}");
    }
    assert_eq!(rig.ask(8, &state(0, 64), &[]), 0, "the session goes on");
}

#[test]
fn messages_for_features_that_are_not_offered_are_refused() {
    let rig = Rig::new();
    rig.negotiate();
    for request in [7u32, 19, 20, 22, 23, 26, 27, 35] {
        assert_ne!(
            rig.ask(request, &0u64.to_ne_bytes(), &[]),
            0,
            "request {request}"
        );
    }
    assert_eq!(rig.ask(8, &state(0, 64), &[]), 0, "the session goes on");
}

#[test]
fn a_split_ring_must_be_a_power_of_two_and_a_packed_one_need_not() {
    let rig = Rig::new();
    rig.negotiate();
    assert_eq!(rig.ask(8, &state(0, 63), &[]), 0, "packed");
    let rig = Rig::new();
    rig.negotiate();
    let split = VERSION_1 | PROTOCOL;
    assert_eq!(rig.ask(2, &split.to_ne_bytes(), &[]), 0);
    assert_ne!(rig.ask(8, &state(0, 63), &[]), 0, "split");
}

#[test]
fn set_up_does_not_change_under_a_running_vring() {
    let rig = Rig::new();
    rig.negotiate();
    let file = memory(MIB);
    assert_eq!(
        rig.ask(37, &single(0, MIB), &[file.as_file().as_raw_fd()]),
        0
    );
    set_up_vring(&rig, 0, 64);
    assert_eq!(rig.ask(18, &state(0, 1), &[]), 0);
    assert_ne!(rig.ask(8, &state(0, 32), &[]), 0);
    assert_ne!(rig.ask(10, &state(0, 1), &[]), 0);
    let mut moved = addr(0);
    moved[8] ^= 0x10;
    assert_ne!(rig.ask(9, &moved, &[]), 0);
    assert_eq!(
        rig.ask(9, &addr(0), &[]),
        0,
        "the same addresses change nothing"
    );
    assert_ne!(
        rig.ask(2, &VERSION_1.to_ne_bytes(), &[]),
        0,
        "other features"
    );
}

#[test]
fn a_disconnect_at_each_step_leaves_a_device_that_serves() {
    let (mut served, mut told) = device(0);
    for step in 0..9 {
        let rig = Rig::on(served, told);
        let file = memory(MIB);
        let fd = file.as_file().as_raw_fd();
        let kick = EventFd::new(0).unwrap();
        let features = TestDevice.features() | PROTOCOL;
        let steps: [(u32, Vec<u8>, Option<RawFd>); 9] = [
            (3, Vec::new(), None),
            (16, (1u64 << 3 | 1 << 15).to_ne_bytes().to_vec(), None),
            (2, features.to_ne_bytes().to_vec(), None),
            (37, single(0, MIB), Some(fd)),
            (8, state(0, 64), None),
            (10, state(0, 0), None),
            (9, addr(0), None),
            (12, 0u64.to_ne_bytes().to_vec(), Some(kick.as_raw_fd())),
            (18, state(0, 1), None),
        ];
        for (request, body, fd) in steps.iter().take(step + 1) {
            rig.send_with(*request, 0, body, fd.as_slice());
        }
        // An answer shows that everything before it was served.
        rig.send_with(1, 0, &[], &[]);
        rig.reply(1);
        (_, served, told) = rig.close();
        let asked: Vec<_> = told.try_iter().collect();
        let starts = asked
            .iter()
            .filter(|a| matches!(a, Asked::Start { .. }))
            .count();
        let stops = asked.iter().filter(|a| matches!(a, Asked::Stop(_))).count();
        assert_eq!(
            (starts, stops),
            (usize::from(step == 8), usize::from(step == 8))
        );
    }
}

#[test]
fn the_daemons_exit_ends_a_waiting_session() {
    let rig = Rig::new();
    rig.negotiate();
    rig.exit.write(1).unwrap();
    assert!(matches!(rig.ended(), SessionEnd::Exit));
}
