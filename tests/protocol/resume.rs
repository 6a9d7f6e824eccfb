//! A session that is written down in its middle and goes on in another handler.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crossbeam::channel::Receiver;
use vringd::control::session::{Resumable, Served};
use vringd::control::{SessionFds, SessionState};

use super::fake::{Event, FakeRunner};
use super::front_end::{Peer, RAM, disk, eventfd, file};
use super::message::{self as m, Message, Region};

struct Saved {
    state: SessionState,
    fds: SessionFds,
    /// The back-end's end of the connection, which outlives its first handler.
    socket: UnixStream,
    peer: Peer,
}

fn served() -> (Served, Arc<FakeRunner>, Receiver<Event>) {
    let device = disk();
    let (runner, events) = FakeRunner::new(4);
    let served = Served {
        device,
        runner: runner.clone(),
    };
    (served, runner, events)
}

/// A session of which vring 1 runs at 0x80058003 and vring 2 is paused.
fn save(features: u64) -> Saved {
    let (served, runner, events) = served();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (peer, exit) = (Peer::new(ours), eventfd());
    let mut session = Resumable::begin(&served, theirs.try_clone().unwrap()).unwrap();
    let mut say = |message: &Message, reply: bool| {
        peer.send(message, m::VERSION);
        session.step(&exit).unwrap();
        if reply {
            peer.receive(message.request).unwrap();
        }
    };
    say(&Message::new(m::GET_FEATURES, &[]), true);
    say(&Message::new(m::GET_PROTOCOL_FEATURES, &[]), true);
    say(&m::u64_message(m::SET_PROTOCOL_FEATURES, m::P_ALL), false);
    say(&Message::new(m::SET_OWNER, &[]), false);
    say(&m::u64_message(m::SET_FEATURES, features), false);
    let ram = file(RAM);
    let region = Region {
        gpa: 0,
        size: RAM,
        offset: 0,
        file: &ram,
    };
    say(&region.add(), false);
    for index in [1, 2] {
        say(&m::state(m::SET_VRING_NUM, index, 256), false);
        say(&m::state(m::SET_VRING_BASE, index, 0x8000_8000), false);
        say(&m::addr(index), false);
        say(
            &m::vring_fd(m::SET_VRING_CALL, index, Some(&eventfd())),
            false,
        );
        say(
            &m::vring_fd(m::SET_VRING_KICK, index, Some(&eventfd())),
            false,
        );
        say(&m::enable(index, true), false);
    }
    say(&m::enable(2, false), false);
    say(&m::u64_message(m::SET_STATUS, 0xf), false);
    assert_eq!(runner.started(), [1, 2]);
    runner.advance(1, 0x8005_8003);
    let (state, fds) = session.save().unwrap();
    assert_eq!(runner.started(), [0; 0]);
    assert_eq!(
        events
            .try_iter()
            .filter(|e| matches!(e, Event::Stop(_)))
            .count(),
        2
    );
    Saved {
        state,
        fds,
        socket: theirs,
        peer,
    }
}

const FEATURES: u64 = m::F_PROTOCOL_FEATURES | m::F_VERSION_1 | m::F_RING_PACKED;

#[test]
fn a_session_goes_on_in_its_middle_from_what_was_written_down() {
    let saved = save(FEATURES);
    let text = serde_json::to_string(&saved.state).unwrap();
    let state: SessionState = serde_json::from_str(&text).unwrap();
    assert_eq!(state, saved.state);
    let (served, runner, events) = served();
    let (peer, exit) = (saved.peer, eventfd());
    // A message that came while nobody served the connection.
    peer.send(&Message::new(m::GET_STATUS, &[]), m::VERSION);
    let mut session = Resumable::resume(&served, saved.socket, state, saved.fds).unwrap();
    let started: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            Event::Start(started) => Some((started.index, started.base, started.call)),
            _ => None,
        })
        .collect();
    assert_eq!(started, [(1, Some(0x8005_8003), true)]);
    session.step(&exit).unwrap();
    assert_eq!(peer.receive(m::GET_STATUS).unwrap(), 0xfu64.to_ne_bytes());

    let mut say = |message: &Message| {
        peer.send(message, m::VERSION | m::NEED_REPLY);
        session.step(&exit).unwrap();
        peer.receive(message.request).unwrap()
    };
    let ok = 0u64.to_ne_bytes();
    assert_eq!(say(&m::enable(2, true)), ok);
    assert!(matches!(events.try_recv(), Ok(Event::Start(started)) if started.index == 2));
    assert_eq!(say(&m::u64_message(m::SET_FEATURES, FEATURES)), ok);
    assert_ne!(say(&m::state(m::SET_VRING_NUM, 1, 128)), ok);
    runner.advance(1, 0x8006_8004);
    let base = say(&m::state(m::GET_VRING_BASE, 1, 0));
    assert_eq!(base[4..], 0x8006_8004u32.to_ne_bytes());
    assert_eq!(runner.started(), [2]);
    drop(peer);
    let end = session.step(&exit).unwrap_err();
    assert_eq!(end.to_string(), "front-end closed the connection");
}

#[test]
fn a_session_can_be_saved_and_resumed_before_anything_was_negotiated() {
    let (served, _, events) = served();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let session = Resumable::begin(&served, theirs.try_clone().unwrap()).unwrap();
    let (state, fds) = session.save().unwrap();
    let mut session = Resumable::resume(&served, theirs, state, fds).unwrap();
    let (peer, exit) = (Peer::new(ours), eventfd());
    peer.send(&Message::new(m::GET_FEATURES, &[]), m::VERSION);
    session.step(&exit).unwrap();
    assert!(peer.receive(m::GET_FEATURES).is_some());
    assert_eq!(events.try_iter().count(), 0);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_nothing_starts() {
    let spoils: [fn(&mut Saved); 4] = [
        |saved| saved.state.vrings.truncate(0),
        |saved| saved.fds.vrings.truncate(0),
        |saved| saved.fds.regions.truncate(0),
        |saved| saved.state.regions[0].size *= 2,
    ];
    for spoil in spoils {
        let mut saved = save(FEATURES);
        spoil(&mut saved);
        let (served, _, events) = served();
        Resumable::resume(&served, saved.socket, saved.state, saved.fds).unwrap_err();
        assert_eq!(events.try_iter().count(), 0);
    }
}

#[test]
fn a_vring_that_waits_for_memory_waits_on_after_a_resume() {
    let mut saved = save(FEATURES);
    saved.state.regions.clear();
    let ram = saved.fds.regions.remove(0);
    let (served, _, events) = served();
    let mut session = Resumable::resume(&served, saved.socket, saved.state, saved.fds).unwrap();
    let is_start = |event: &Event| matches!(event, Event::Start(_));
    assert_eq!(events.try_iter().filter(is_start).count(), 0);
    let region = Region {
        gpa: 0,
        size: RAM,
        offset: 0,
        file: &ram,
    };
    let message = region.add();
    saved.peer.send(&message, m::VERSION | m::NEED_REPLY);
    session.step(&eventfd()).unwrap();
    assert_eq!(saved.peer.receive(m::ADD_MEM_REG).unwrap(), [0; 8]);
    assert_eq!(events.try_iter().filter(is_start).count(), 1);
}
