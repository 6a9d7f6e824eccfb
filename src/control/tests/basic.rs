//! Front-ends that keep to the protocol, whichever part of it they know.

use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::super::session::Resumable;
use super::super::{SessionFds, SessionState};
use super::*;

fn started(rig: &Rig, index: u16, base: Option<u32>) {
    let features = TestDevice.features();
    let start = Asked::Start {
        index,
        size: 64,
        features,
        base,
        kick: true,
    };
    assert_eq!(rig.next(), start);
}

#[test]
fn a_vring_starts_when_it_has_all_it_needs_and_is_enabled() {
    let rig = Rig::new();
    let features = rig.negotiate();
    assert_eq!(features, TestDevice.features() | PROTOCOL);
    assert_eq!(rig.next(), Asked::Negotiated(features));
    set_up_vring(&rig, 1, 64);
    assert!(rig.told.try_recv().is_err(), "no memory, not enabled");
    let file = memory(MIB);
    assert_eq!(
        rig.ask(37, &single(0, MIB), &[file.as_file().as_raw_fd()]),
        0
    );
    assert!(rig.told.try_recv().is_err(), "not enabled");
    assert_eq!(rig.ask(18, &state(1, 1), &[]), 0);
    started(&rig, 1, Some(0));
    assert_eq!(rig.ask(18, &state(1, 0), &[]), 0);
    assert_eq!(rig.next(), Asked::Pause(1, true));
    assert_eq!(rig.ask(18, &state(1, 1), &[]), 0);
    assert_eq!(rig.next(), Asked::Pause(1, false));
    let call = EventFd::new(0).unwrap();
    assert_eq!(rig.ask(13, &1u64.to_ne_bytes(), &[call.as_raw_fd()]), 0);
    assert_eq!(rig.next(), Asked::Call(1));
    rig.send_with(11, 0, &state(1, 0), &[]);
    assert_eq!(
        rig.reply(11),
        state(1, 0x8046_804d),
        "all 32 bits of the base"
    );
    assert_eq!(rig.next(), Asked::Stop(1));
    // The same base comes back and is taken as it is.
    assert_eq!(rig.ask(10, &state(1, 0x8046_804d), &[]), 0);
    let kick = EventFd::new(0).unwrap();
    assert_eq!(rig.ask(12, &1u64.to_ne_bytes(), &[kick.as_raw_fd()]), 0);
    started(&rig, 1, Some(0x8046_804d));
    let (end, _, told) = rig.close();
    assert!(matches!(end, SessionEnd::Closed), "{end}");
    assert_eq!(
        told.recv(),
        Ok(Asked::Stop(1)),
        "a session that ends stops what it started"
    );
}

#[test]
fn an_enable_before_the_features_is_remembered() {
    // What QEMU's virtio-net does, and sends no other.
    let rig = Rig::new();
    rig.send_with(3, 0, &[], &[]);
    rig.send_with(1, 0, &[], &[]);
    let features = rig.reply_u64(1);
    rig.send_with(16, 0, &(1u64 << 3 | 1 << 15).to_ne_bytes(), &[]);
    assert_eq!(rig.ask(18, &state(0, 1), &[]), 0);
    assert_eq!(rig.ask(2, &features.to_ne_bytes(), &[]), 0);
    assert_eq!(rig.next(), Asked::Negotiated(features));
    let file = memory(MIB);
    assert_eq!(
        rig.ask(37, &single(0, MIB), &[file.as_file().as_raw_fd()]),
        0
    );
    set_up_vring(&rig, 0, 64);
    started(&rig, 0, Some(0));
}

#[test]
fn a_front_end_without_protocol_features_is_served() {
    // No REPLY_ACK, no enable, SET_MEM_TABLE alone.
    let rig = Rig::new();
    rig.send_with(3, 0, &[], &[]);
    rig.send_with(2, 0, &VERSION_1.to_ne_bytes(), &[]);
    assert_eq!(rig.next(), Asked::Negotiated(VERSION_1));
    let file = memory(2 * MIB);
    let fd = file.as_file().as_raw_fd();
    // Out of order: the higher region first.
    let mut table = state(2, 0);
    table.extend(region(MIB, MIB));
    table.extend(region(0, MIB));
    rig.send_with(5, 0, &table, &[fd, fd]);
    rig.send_with(8, 0, &state(0, 64), &[]);
    rig.send_with(10, 0, &state(0, 7), &[]);
    rig.send_with(9, 0, &addr(0), &[]);
    // Bit 8: there is no kick fd, the ring is to be polled.
    rig.send_with(12, 0, &(1u64 << 8).to_ne_bytes(), &[]);
    let start = Asked::Start {
        index: 0,
        size: 64,
        features: VERSION_1,
        base: Some(7),
        kick: false,
    };
    assert_eq!(rig.next(), start);
}

#[test]
fn the_crates_own_front_end_can_talk_to_us() {
    let rig = Rig::new();
    let mut frontend = Frontend::from_stream(rig.socket.try_clone().unwrap(), 4);
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    frontend.set_features(features).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(frontend.get_queue_num().unwrap(), 4);
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 509);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
    let (_, config) = frontend.get_config(8, 4, flags, &[0; 4]).unwrap();
    assert_eq!(config, [8, 9, 10, 11]);
    frontend.set_vring_num(0, 64).unwrap();
    frontend.set_vring_num(0, 63).unwrap();
    assert!(
        frontend.set_vring_num(9, 64).is_err(),
        "there is no vring 9"
    );
    frontend.set_vring_base(0, 3).unwrap();
    frontend.set_vring_enable(0, false).unwrap();
    frontend.reset_device().unwrap();
    assert_eq!(
        frontend.get_vring_base(0).unwrap(),
        0x8000_8000,
        "fresh after a reset"
    );
}

#[test]
fn status_zero_and_reset_device_stop_the_vrings() {
    for reset in [true, false] {
        let rig = Rig::new();
        rig.negotiate();
        rig.next();
        let file = memory(MIB);
        assert_eq!(
            rig.ask(37, &single(0, MIB), &[file.as_file().as_raw_fd()]),
            0
        );
        set_up_vring(&rig, 0, 64);
        assert_eq!(rig.ask(18, &state(0, 1), &[]), 0);
        started(&rig, 0, Some(0));
        assert_eq!(rig.ask(39, &15u64.to_ne_bytes(), &[]), 0);
        rig.send_with(40, 0, &[], &[]);
        assert_eq!(rig.reply_u64(40), 15);
        if reset {
            assert_eq!(rig.ask(34, &[], &[]), 0);
        } else {
            assert_eq!(rig.ask(39, &0u64.to_ne_bytes(), &[]), 0);
        }
        assert_eq!(rig.next(), Asked::Stop(0));
        rig.send_with(40, 0, &[], &[]);
        assert_eq!(rig.reply_u64(40), 0);
    }
}

#[test]
fn memory_may_change_under_a_running_vring() {
    let rig = Rig::new();
    rig.negotiate();
    rig.next();
    let file = memory(2 * MIB);
    let fd = file.as_file().as_raw_fd();
    assert_eq!(rig.ask(37, &single(0, MIB), &[fd]), 0);
    set_up_vring(&rig, 0, 64);
    assert_eq!(rig.ask(18, &state(0, 1), &[]), 0);
    started(&rig, 0, Some(0));
    assert_eq!(rig.ask(37, &single(MIB, MIB), &[fd]), 0);
    assert_eq!(rig.next(), Asked::Swap(0, 2));
    // QEMU 7.2 adds and removes a region once for every queue pair.
    assert_eq!(rig.ask(37, &single(MIB, MIB), &[fd]), 0);
    assert_eq!(rig.ask(38, &single(MIB, MIB), &[fd]), 0);
    assert_eq!(rig.ask(38, &single(MIB, MIB), &[fd]), 0);
    assert_eq!(rig.next(), Asked::Swap(0, 1));
    assert_ne!(rig.ask(38, &single(MIB, MIB), &[fd]), 0, "it is gone");
    // The region of the ring itself goes: the vring stops, and starts again when it is back.
    assert_eq!(rig.ask(38, &single(0, MIB), &[fd]), 0);
    assert_eq!(rig.next(), Asked::Stop(0));
    assert_eq!(rig.ask(37, &single(0, MIB), &[fd]), 0);
    started(&rig, 0, Some(0x8046_804d));
}

#[test]
fn one_session_after_another_on_the_same_device() {
    let (mut served, mut told) = device(5);
    for _ in 0..3 {
        let rig = Rig::on(served, told);
        rig.negotiate();
        rig.next();
        let file = memory(MIB);
        assert_eq!(
            rig.ask(37, &single(0, MIB), &[file.as_file().as_raw_fd()]),
            0
        );
        set_up_vring(&rig, 3, 64);
        assert_eq!(rig.ask(18, &state(3, 1), &[]), 0);
        started(&rig, 3, Some(0));
        (_, served, told) = rig.close();
        assert_eq!(told.recv(), Ok(Asked::Stop(3)));
    }
}

#[test]
fn a_session_is_saved_and_resumed_in_its_middle() {
    let (served, told) = device(0x8003_8003);
    let (socket, theirs) = UnixStream::pair().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let exit = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut first = Resumable::begin(&served, theirs.try_clone().unwrap()).unwrap();
    let (_, unused) = channel();
    let rig = Rig {
        socket,
        told: unused,
        served: served.clone(),
        thread: None,
        exit,
    };
    let file = memory(MIB);
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let features = TestDevice.features() | PROTOCOL;
    let messages: [(u32, Vec<u8>, Option<RawFd>); 9] = [
        (3, Vec::new(), None),
        (2, features.to_ne_bytes().to_vec(), None),
        (16, (1u64 << 3 | 1 << 15).to_ne_bytes().to_vec(), None),
        (37, single(0, MIB), Some(file.as_file().as_raw_fd())),
        (8, state(0, 64), None),
        (9, addr(0), None),
        (13, 0u64.to_ne_bytes().to_vec(), Some(call.as_raw_fd())),
        (12, 0u64.to_ne_bytes().to_vec(), Some(kick.as_raw_fd())),
        (18, state(0, 1), None),
    ];
    for (request, body, fd) in &messages {
        rig.send_with(*request, 0, body, fd.as_slice());
        first.step(&rig.exit).unwrap();
    }
    let start = |base| {
        let features = TestDevice.features();
        Asked::Start {
            index: 0,
            size: 64,
            features,
            base,
            kick: true,
        }
    };
    assert_eq!(told.recv(), Ok(Asked::Negotiated(features)));
    assert_eq!(told.recv(), Ok(start(None)));
    // Everything goes through text, but for the descriptors and the socket.
    let (state_before, fds): (SessionState, SessionFds) = first.save().unwrap();
    assert_eq!(told.recv(), Ok(Asked::Stop(0)));
    let text = serde_json::to_string(&state_before).unwrap();
    let state_after: SessionState = serde_json::from_str(&text).unwrap();
    assert_eq!(state_after, state_before);
    let mut second = Resumable::resume(&served, theirs, state_after, fds).unwrap();
    assert_eq!(told.recv(), Ok(Asked::Negotiated(features)));
    assert_eq!(told.recv(), Ok(start(Some(0x8003_8003))));
    // The front-end notices nothing: acknowledgements are still on, and so are its vrings.
    rig.send_with(18, NEED_REPLY, &state(0, 0), &[]);
    second.step(&rig.exit).unwrap();
    assert_eq!(rig.reply_u64(18), 0);
    rig.send_with(11, 0, &state(0, 0), &[]);
    second.step(&rig.exit).unwrap();
    assert_eq!(rig.reply(11), state(0, 0x8003_8003));
}
