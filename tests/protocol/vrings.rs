//! The life of a vring: what it needs to start, what changes it while it runs, how it stops.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use super::fake::{CALLED, ERRED, Event};
use super::front_end::{Session, eventfd};
use super::message::{self as m, Message};

#[test]
fn the_base_is_32_bits_both_ways() {
    // Packed: both cursors with their wrap counters.
    let session = Session::ready(true);
    assert_eq!(session.run_vring(0, 0x8046_804d).base, Some(0x8046_804d));
    session.runner.advance(0, 0x8005_8003);
    assert_eq!(session.peer.get_base(0), 0x8005_8003);
    assert_eq!(session.next(), Event::Stop(0));
    assert_eq!(session.peer.get_base(0), 0x8005_8003, "asked again");
    session.quiet();
    session.leave();
}

#[test]
fn a_base_can_be_asked_in_every_state() {
    let session = Session::ready(false);
    let peer = &session.peer;
    assert_eq!(peer.get_base(0), 0, "unset");
    peer.ok(&m::state(m::SET_VRING_BASE, 0, 77));
    assert_eq!(peer.get_base(0), 77, "set");
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr(0));
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
    assert_eq!(peer.get_base(0), 77, "ready, not enabled");
    session.quiet();
    // What was ready is not any more: it needs a kick again.
    peer.ok(&m::enable(0, true));
    session.quiet();
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
    assert_eq!(session.next_start().base, Some(77));
    session.runner.advance(0, 78);
    peer.ok(&m::enable(0, false));
    assert_eq!(session.next(), Event::Pause(0, true));
    assert_eq!(peer.get_base(0), 78, "paused");
    assert_eq!(session.next(), Event::Stop(0));
    session.leave();
}

#[test]
fn a_packed_vring_without_a_base_stands_at_the_start() {
    let session = Session::ready(true);
    assert_eq!(session.peer.get_base(1), 0x8000_8000);
    session.leave();
}

#[test]
fn a_stopped_vring_starts_where_it_stood_at_the_next_kick() {
    let session = Session::ready(false);
    session.run_vring(1, 5);
    session.runner.advance(1, 500);
    assert_eq!(session.peer.get_base(1), 500);
    assert_eq!(session.next(), Event::Stop(1));
    let kick = m::vring_fd(m::SET_VRING_KICK, 1, Some(&eventfd()));
    session.peer.ok(&kick);
    assert_eq!(session.next_start().base, Some(500));
    session.leave();
}

/// VIRTIO_F_RING_RESET as a front-end carries it out (docs/decisions/0008).
#[test]
fn one_vring_is_reset_to_another_size_while_the_other_runs() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    session.run_vring(1, 0);
    let peer = &session.peer;
    session.runner.advance(0, 77);
    assert_eq!(peer.get_base(0), 77);
    assert_eq!(session.next(), Event::Stop(0));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 64));
    peer.ok(&m::state(m::SET_VRING_BASE, 0, 0));
    peer.ok(&m::addr(0));
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd()));
    peer.ok(&kick);
    let start = session.next_start();
    assert_eq!((start.index, start.size, start.base), (0, 64, Some(0)));
    session.quiet();
    session.leave();
}

#[test]
fn a_vring_without_a_kick_fd_starts_and_is_polled() {
    let session = Session::ready(false);
    let peer = &session.peer;
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr(0));
    session.quiet();
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, None::<&File>));
    assert_eq!(session.next_start().kick, None);
    session.leave();
}

#[test]
fn a_disabled_vring_is_paused_and_goes_on_when_enabled() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    for (on, paused) in [(false, true), (true, false)] {
        session.peer.ok(&m::enable(0, on));
        assert_eq!(session.next(), Event::Pause(0, paused));
        session.peer.ok(&m::enable(0, on));
        session.quiet();
    }
    session.peer.refused(&m::state(m::SET_VRING_ENABLE, 0, 2));
    session.quiet();
    session.leave();
}

#[test]
fn a_running_vring_is_not_set_up_anew() {
    let session = Session::ready(false);
    session.run_vring(0, 0);
    let peer = &session.peer;
    peer.refused(&m::state(m::SET_VRING_NUM, 0, 128));
    peer.refused(&m::state(m::SET_VRING_BASE, 0, 1));
    peer.refused(&m::addr(1).for_vring(0));
    // The same addresses, for logging switched on or off, are no change.
    peer.ok(&m::addr(0));
    session.quiet();
    peer.ok(&m::enable(0, false));
    assert_eq!(session.next(), Event::Pause(0, true));
    peer.refused(&m::state(m::SET_VRING_NUM, 0, 128));
    session.leave();
}

#[test]
fn another_kick_for_a_running_vring_goes_over_a_stop_at_the_same_base() {
    let session = Session::ready(false);
    session.run_vring(0, 3);
    session.runner.advance(0, 11);
    let kick = eventfd();
    kick.write(99).unwrap();
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, Some(&kick));
    session.peer.ok(&kick);
    assert_eq!(session.next(), Event::Stop(0));
    let started = session.next_start();
    assert_eq!((started.base, started.kick), (Some(11), Some(99)));
    session.leave();
}

#[test]
fn call_and_err_reach_the_vring_before_and_after_its_start() {
    let session = Session::ready(false);
    let (call, err) = (eventfd(), eventfd());
    session
        .peer
        .ok(&m::vring_fd(m::SET_VRING_CALL, 0, Some(&call)));
    session
        .peer
        .ok(&m::vring_fd(m::SET_VRING_ERR, 0, Some(&err)));
    let started = session.run_vring(0, 0);
    assert_eq!((started.call, started.err), (true, true));
    assert_eq!((call.read().unwrap(), err.read().unwrap()), (CALLED, ERRED));
    let other = eventfd();
    session
        .peer
        .ok(&m::vring_fd(m::SET_VRING_CALL, 0, Some(&other)));
    assert_eq!(session.next(), Event::Call(0, true, true));
    assert_eq!(other.read().unwrap(), CALLED);
    call.read().unwrap_err();
    session
        .peer
        .ok(&m::vring_fd(m::SET_VRING_CALL, 0, None::<&File>));
    assert_eq!(session.next(), Event::Call(0, false, true));
    session.leave();
}

#[test]
fn a_kick_call_or_err_that_is_no_eventfd_is_refused() {
    let session = Session::ready(false);
    let peer = &session.peer;
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr(0));
    let (socket, _other) = UnixStream::pair().unwrap();
    for request in [m::SET_VRING_KICK, m::SET_VRING_CALL, m::SET_VRING_ERR] {
        peer.refused(&m::vring_fd(request, 0, Some(&socket)));
        peer.refused(&m::vring_fd(request, 0, Some(&session.ram)));
    }
    session.logged("must be an eventfd, not socket:");
    session.quiet();
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
    let started = session.next_start();
    assert_eq!((started.call, started.err), (false, false));
    session.leave();
}

#[test]
fn sizes_are_those_of_the_ring_format() {
    for (packed, good, bad) in [
        (
            false,
            &[1, 2, 256, 32768][..],
            &[0, 3, 1025, 32769, 65536][..],
        ),
        (true, &[1, 3, 1025, 32768][..], &[0, 32769, 65537][..]),
    ] {
        let session = Session::ready(packed);
        for size in good {
            session.peer.ok(&m::state(m::SET_VRING_NUM, 0, *size));
        }
        for size in bad {
            session.peer.refused(&m::state(m::SET_VRING_NUM, 0, *size));
        }
        session.leave();
    }
}

#[test]
fn an_index_beyond_the_vrings_is_refused_by_every_message() {
    let session = Session::ready(false);
    let peer = &session.peer;
    for index in [4, 255] {
        peer.refused(&m::state(m::SET_VRING_NUM, index, 256));
        peer.refused(&m::addr(0).for_vring(index));
        peer.refused(&m::state(m::SET_VRING_BASE, index, 0));
        peer.refused(&m::enable(index, true));
        for request in [m::SET_VRING_KICK, m::SET_VRING_CALL, m::SET_VRING_ERR] {
            peer.refused(&m::vring_fd(request, index, Some(&eventfd())));
        }
    }
    peer.refused(&m::enable(u32::MAX, true));
    // A question can't be refused but by hanging up.
    assert_eq!(peer.ask(&m::state(m::GET_VRING_BASE, 4, 0)), None);
    let (end, clean) = session.end();
    assert!(
        end.contains("vring index 4: disk0 has vrings 0 to 3"),
        "{end}"
    );
    assert!(clean);
}

#[test]
fn a_vring_that_can_not_start_holds_no_other_up() {
    let session = Session::ready(false);
    let peer = &session.peer;
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr_at(0, 0x1000));
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd()));
    peer.refused(&kick);
    session.logged("front-end address 0x1000");
    session.quiet();
    assert_eq!(session.run_vring(1, 0).index, 1);
    peer.ok(&m::addr(0));
    assert_eq!(session.next_start().index, 0);
    session.leave();
}

#[test]
fn an_unaligned_driver_area_of_a_packed_ring_is_refused() {
    // The crate checks for split rings only, whose available ring may lie at any even address.
    let session = Session::ready(true);
    let peer = &session.peer;
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    let words = [0, m::UVA, m::UVA + 0xe000, m::UVA + 0xc002, 0];
    peer.ok(&m::words(m::SET_VRING_ADDR, &words));
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd()));
    peer.refused(&kick);
    session.quiet();
    session.leave();
}

#[test]
fn a_vring_that_does_not_drain_ends_the_session_without_a_base() {
    let session = Session::ready(false);
    session.run_vring(0, 5);
    session.runner.stuck.store(true, Ordering::SeqCst);
    let question = m::state(m::GET_VRING_BASE, 0, 0);
    assert_eq!(session.peer.ask(&question), None);
    let (end, clean) = session.end();
    assert!(end.contains("1 requests still in flight"), "{end}");
    assert!(!clean, "the vring was not stopped");
}

#[test]
fn a_stop_that_fails_ends_the_session_whatever_asked_for_it() {
    let device_reset = Message::new(m::RESET_DEVICE, &[]);
    let kick = m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd()));
    let status = m::u64_message(m::SET_STATUS, 0);
    for message in [device_reset, kick, status] {
        let session = Session::ready(false);
        session.run_vring(0, 5);
        session.runner.stuck.store(true, Ordering::SeqCst);
        session.peer.refused(&message);
        assert_eq!(session.peer.receive(0), None);
        let (end, clean) = session.end();
        assert!(end.contains("still in flight"), "{end}");
        assert!(!clean, "the vring was not stopped");
    }
}
