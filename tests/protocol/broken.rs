//! Front-ends that break the protocol: a clear end or a refusal, never a hang.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vringd::control::session::{Resumable, Served};

use super::fake::{Event, FakeRunner};
use super::front_end::{Peer, Session, TIMEOUT, disk, eventfd, file};
use super::message::{self as m, Message};
use crate::support::deadline::wait_until;

const CLOSED: &str = "front-end closed the connection";

#[test]
fn every_request_with_any_body_is_answered_or_ends_the_session() {
    for request in 0..64 {
        for size in [0, 1, 8, 12, 16, 40, 4096] {
            let session = Session::ready(false);
            let message = match (request, size) {
                // Zeros would take back that anything is answered.
                (m::SET_PROTOCOL_FEATURES, 8) => m::u64_message(request, m::P_ALL),
                _ => Message::new(request, &vec![0; size]),
            };
            // Twice, because some requests are right only once.
            for _ in 0..2 {
                session.peer.try_send(&message, m::VERSION | m::NEED_REPLY);
            }
            let answers = (0..2).filter_map(|_| session.peer.receive(request)).count();
            if answers == 2 {
                // Still in step.
                session.peer.get(m::GET_FEATURES);
                assert_eq!(session.leave(), (CLOSED.into(), true));
            } else {
                let (end, clean) = session.end();
                assert!(clean);
                assert_ne!(end, CLOSED, "request {request} of {size} bytes");
                assert!(!end.starts_with("socket:"), "request {request}: {end}");
            }
        }
    }
}

#[test]
fn descriptors_along_with_any_request_are_closed_in_the_end() {
    for request in 0..64 {
        for count in 1..4 {
            let session = Session::ready(false);
            let (kept, sent): (Vec<_>, Vec<_>) =
                (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
            let message = m::u64_message(request, 0);
            let message = sent.iter().fold(message, Message::with);
            session.peer.try_send(&message, m::VERSION);
            drop((sent, message));
            session.peer.0.shutdown(Shutdown::Write).unwrap();
            let (_, clean) = session.end();
            assert!(clean, "request {request}");
            for mut end in kept {
                end.set_read_timeout(Some(TIMEOUT)).unwrap();
                let read = end.read(&mut [0]);
                let closed = matches!(read, Ok(0) | Err(_)) && !is_late(&read);
                assert!(closed, "request {request}, {count} descriptors: {read:?}");
            }
        }
    }
}

/// Whether nothing came in time.
fn is_late(read: &std::io::Result<usize>) -> bool {
    let kind = read.as_ref().err().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::WouldBlock)
}

#[test]
fn every_request_may_come_first() {
    for request in 0..64 {
        for size in [0, 8, 40] {
            let session = Session::start(disk());
            let message = Message::new(request, &vec![0; size]);
            session.peer.send(&message, m::VERSION);
            session.peer.0.shutdown(Shutdown::Write).unwrap();
            let (_, clean) = session.end();
            assert!(clean, "request {request}");
        }
    }
}

#[test]
fn a_message_cut_anywhere_ends_the_session_by_name() {
    let message = m::state(m::SET_VRING_NUM, 0, 256).bytes(m::VERSION);
    for cut in 1..message.len() {
        let session = Session::ready(false);
        session.run_vring(1, 0);
        session.peer.write(&message[..cut]);
        let (end, clean) = session.leave();
        assert_eq!(
            end,
            format!("message: connection closed after {cut} bytes of a message")
        );
        assert!(clean);
    }
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let session = Session::ready(false);
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, None::<&std::fs::File>);
    for message in [m::state(m::SET_VRING_NUM, 0, 256), m::addr(0), kick] {
        for byte in message.bytes(m::VERSION | m::NEED_REPLY) {
            session.peer.write(&[byte]);
        }
        let body = session.peer.receive(message.request).unwrap();
        assert_eq!(body, 0u64.to_ne_bytes());
    }
    session.peer.ok(&m::enable(0, true));
    assert_eq!(session.next_start().size, 256);
    session.leave();
}

#[test]
fn waiting_for_the_rest_of_a_message_takes_no_cpu() {
    let session = Session::ready(false);
    let message = m::state(m::SET_VRING_NUM, 0, 256).bytes(m::VERSION | m::NEED_REPLY);
    // The state of a thread that sleeps is S, time after time; one that polls in a loop is R.
    let stat = format!("/proc/self/task/{}/stat", session.thread_id);
    let mut asleep = 0;
    for part in message.chunks(7) {
        session.peer.write(part);
        if part.len() < 7 {
            break;
        }
        wait_until("the session sleeps", TIMEOUT, || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            let state = stat.rsplit(") ").next().unwrap().as_bytes()[0];
            asleep = if state == b'S' { asleep + 1 } else { 0 };
            (asleep >= 50).then_some(())
        });
    }
    assert!(session.peer.receive(m::SET_VRING_NUM).is_some());
    session.leave();
}

#[test]
fn a_broken_header_ends_the_session_by_name() {
    let num = m::state(m::SET_VRING_NUM, 0, 256);
    let status = m::u64_message(m::SET_STATUS, 0);
    for message in [&num, &status, &m::enable(0, true)] {
        for flags in [0, 2, 3, m::VERSION | m::REPLY, m::VERSION | 0x10] {
            let session = Session::ready(false);
            session.peer.send(message, flags);
            assert_eq!(session.peer.receive(0), None);
            let (end, clean) = session.end();
            assert!(end.contains(&format!("flags {flags:#x}")), "{end}");
            assert!(clean);
        }
    }
    let session = Session::ready(false);
    let head = [m::SET_VRING_NUM, m::VERSION, 4097].map(u32::to_ne_bytes);
    session.peer.write(&head.concat());
    let (end, clean) = session.end();
    assert_eq!(end, "SET_VRING_NUM: a body of 4097 bytes");
    assert!(clean);
}

#[test]
fn descriptors_where_none_belong_end_the_session() {
    let session = Session::ready(false);
    let page = file(4096);
    session
        .peer
        .send(&m::state(m::SET_VRING_NUM, 0, 256).with(&page), m::VERSION);
    let (end, clean) = session.end();
    assert!(end.starts_with("SET_VRING_NUM:"), "{end}");
    assert!(clean);
}

#[test]
fn more_descriptors_than_regions_can_have_end_the_session() {
    let session = Session::ready(false);
    let page = file(4096);
    let message = (0..40).fold(m::mem_table(&[session.region()]), |all, _| all.with(&page));
    session.peer.send(&message, m::VERSION);
    assert_eq!(session.peer.receive(0), None);
    let (_, clean) = session.end();
    assert!(clean);
}

#[test]
fn a_connection_that_ends_after_any_message_stops_every_vring() {
    let steps = |session: &Session| {
        let mut steps = vec![
            Message::new(m::GET_FEATURES, &[]),
            Message::new(m::GET_PROTOCOL_FEATURES, &[]),
            m::u64_message(m::SET_PROTOCOL_FEATURES, m::P_ALL),
            Message::new(m::SET_OWNER, &[]),
            m::u64_message(m::SET_FEATURES, m::F_PROTOCOL_FEATURES | m::F_VERSION_1),
            session.region().add(),
        ];
        for index in 0..2 {
            steps.extend([
                m::enable(index, true),
                m::state(m::SET_VRING_NUM, index, 256),
                m::state(m::SET_VRING_BASE, index, 0),
                m::addr(index),
                m::vring_fd(m::SET_VRING_KICK, index, Some(&eventfd())),
                m::vring_fd(m::SET_VRING_CALL, index, Some(&eventfd())),
            ]);
        }
        steps.push(m::enable(0, false));
        steps.push(m::state(m::GET_VRING_BASE, 0, 0));
        steps.push(m::u64_message(m::SET_STATUS, 0));
        steps
    };
    let count = steps(&Session::start(disk())).len();
    let mut most = 0;
    for last in 0..=count {
        let session = Session::start(disk());
        for message in steps(&session).into_iter().take(last) {
            session.peer.send(&message, m::VERSION);
        }
        // Read everything that it says, so that its end is no broken pipe.
        session.peer.0.shutdown(Shutdown::Write).unwrap();
        for request in [m::GET_FEATURES, m::GET_PROTOCOL_FEATURES, m::GET_VRING_BASE] {
            if session.peer.receive(request).is_none() {
                break;
            }
        }
        let (runner, events) = (session.runner.clone(), session.events.clone());
        assert_eq!(
            session.end(),
            (CLOSED.into(), true),
            "after {last} messages"
        );
        assert_eq!(runner.started(), [0; 0], "after {last} messages");
        let starts = |event: &Event| matches!(event, Event::Start(_));
        most = most.max(events.try_iter().filter(starts).count());
    }
    assert_eq!(most, 2, "both vrings ran in the longest of the sessions");
}

#[test]
fn the_daemon_can_exit_in_the_middle_of_a_message() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    session.peer.write(&[1, 0, 0]);
    session.exit.write(1).unwrap();
    let runner = session.runner.clone();
    assert_eq!(session.end(), ("daemon is shutting down".into(), true));
    assert_eq!(runner.started(), [0; 0]);
}

#[test]
fn a_front_end_that_never_reads_can_not_keep_the_daemon_from_exiting() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    // Until our own buffer is full: then the session waits for room for its answers.
    session.peer.0.set_nonblocking(true).unwrap();
    let question = Message::new(m::GET_FEATURES, &[]).bytes(m::VERSION);
    wait_until("the session is stuck", TIMEOUT, || {
        let mut sent = 0;
        while (&session.peer.0).write(&question).is_ok() {
            sent += 1;
        }
        (sent == 0).then_some(())
    });
    session.exit.write(1).unwrap();
    assert_eq!(session.end(), ("daemon is shutting down".into(), true));
}

#[test]
fn a_front_end_that_never_pauses_can_not_keep_the_daemon_from_exiting() {
    let device = disk();
    let (runner, events) = FakeRunner::new(device.vrings_max());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (peer, exit) = (Peer::new(ours), eventfd());
    let mut session = Resumable::begin(&Served { device, runner }, theirs).unwrap();
    // There is always another message.
    for _ in 0..3 {
        peer.send(&m::u64_message(m::SET_FEATURES, m::F_VERSION_1), m::VERSION);
    }
    session.step(&exit).unwrap();
    assert_eq!(events.try_iter().count(), 1);
    exit.write(1).unwrap();
    let end = session.step(&exit).unwrap_err();
    assert_eq!(end.to_string(), "daemon is shutting down");
    assert_eq!(events.try_iter().count(), 0);
}
