//! Features, protocol features, and front-ends that negotiate little.

use super::fake::{Event, Started};
use super::front_end::{Session, disk, eventfd, nic};
use super::message::{self as m, Message};

#[test]
fn a_front_end_without_protocol_features_is_served_with_set_mem_table_only() {
    for device in [disk(), nic()] {
        let session = Session::start(device);
        let peer = &session.peer;
        let kick = eventfd();
        kick.write(3).unwrap();
        peer.get(m::GET_FEATURES);
        peer.tell(&Message::new(m::SET_OWNER, &[]));
        peer.tell(&m::u64_message(m::SET_FEATURES, m::F_VERSION_1));
        assert_eq!(session.next(), Event::Negotiated(m::F_VERSION_1));
        peer.tell(&m::mem_table(&[session.region()]));
        peer.tell(&m::state(m::SET_VRING_NUM, 0, 256));
        peer.tell(&m::state(m::SET_VRING_BASE, 0, 17));
        peer.tell(&m::addr(0));
        session.quiet();
        // No SET_VRING_ENABLE: such a ring is enabled from the start.
        peer.tell(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&kick)));
        let expected = Started {
            index: 0,
            size: 256,
            features: m::F_VERSION_1,
            base: Some(17),
            kick: Some(3),
            call: false,
            err: false,
        };
        assert_eq!(session.next_start(), expected);
        session.runner.advance(0, 40);
        assert_eq!(session.peer.get_base(0), 40);
        assert_eq!(session.next(), Event::Stop(0));
        assert!(session.leave().1);
    }
}

#[test]
fn an_enable_before_set_features_is_remembered_for_the_kick() {
    // The order of QEMU's virtio-net: its only SET_VRING_ENABLE comes first.
    let session = Session::start(nic());
    let peer = &session.peer;
    peer.get(m::GET_FEATURES);
    peer.get(m::GET_PROTOCOL_FEATURES);
    peer.tell(&m::u64_message(m::SET_PROTOCOL_FEATURES, m::P_ALL));
    peer.tell(&Message::new(m::SET_OWNER, &[]));
    peer.ok(&m::enable(0, true));
    peer.ok(&m::enable(1, true));
    let features = m::F_PROTOCOL_FEATURES | m::F_VERSION_1 | m::F_RING_PACKED;
    peer.ok(&m::u64_message(m::SET_FEATURES, features));
    assert_eq!(session.next(), Event::Negotiated(features));
    peer.ok(&session.region().add());
    for index in 0..3u16 {
        let vring = u32::from(index);
        peer.ok(&m::state(m::SET_VRING_NUM, vring, 1025));
        peer.ok(&m::state(m::SET_VRING_BASE, vring, 0x8000_8000));
        peer.ok(&m::addr(vring));
        session.quiet();
        peer.ok(&m::vring_fd(m::SET_VRING_KICK, vring, Some(&eventfd())));
        if index < 2 {
            let started = session.next_start();
            assert_eq!((started.index, started.size), (index, 1025));
            assert_eq!(started.features, features & !m::F_PROTOCOL_FEATURES);
        }
        // The third was not enabled.
        session.quiet();
    }
    peer.ok(&m::enable(2, true));
    assert_eq!(session.next_start().index, 2);
    session.leave();
}

#[test]
fn features_that_were_not_offered_are_refused_by_name_and_the_session_goes_on() {
    let session = Session::ready(false);
    let peer = &session.peer;
    let foreign = m::F_PROTOCOL_FEATURES | m::F_VERSION_1 | 1 << 40 | 1 << 50;
    peer.refused(&m::u64_message(m::SET_FEATURES, foreign));
    let line = session.logged("VIRTIO_F_RING_RESET,bit50");
    assert!(!line.contains("VIRTIO_F_VERSION_1"), "{line}");
    peer.refused(&m::u64_message(m::SET_PROTOCOL_FEATURES, m::P_ALL | 1 << 1));
    session.logged("LOG_SHMFD");
    // What was negotiated before still holds.
    session.quiet();
    let started = session.run_vring(0, 0);
    assert_eq!(started.features, m::F_VERSION_1);
    assert_eq!(
        session.leave(),
        ("front-end closed the connection".into(), true)
    );
}

#[test]
fn refused_features_do_not_change_what_is_answered() {
    // The crate's parser keeps even what we refuse; ours must stay in step with it.
    let session = Session::ready(false);
    let peer = &session.peer;
    peer.refused(&m::u64_message(m::SET_FEATURES, 1 << 50));
    peer.ok(&m::enable(0, true));
    peer.refused(&m::u64_message(
        m::SET_PROTOCOL_FEATURES,
        m::P_REPLY_ACK | 1 << 1,
    ));
    peer.refused(&m::state(m::SET_VRING_NUM, 0, 0));
    peer.refused(&m::u64_message(20, 1500));
    peer.get(m::GET_FEATURES);
    session.leave();
}

#[test]
fn nothing_is_acknowledged_without_reply_ack() {
    let session = Session::start(disk());
    let peer = &session.peer;
    peer.negotiate(
        m::F_PROTOCOL_FEATURES | m::F_VERSION_1,
        m::P_ALL & !m::P_REPLY_ACK,
    );
    for message in [
        m::state(m::SET_VRING_NUM, 0, 256),
        m::state(m::SET_VRING_NUM, 0, 0),
        m::enable(0, true),
        m::enable(99, true),
        m::u64_message(m::SET_STATUS, 1),
        m::u64_message(m::SET_STATUS, 256),
        m::u64_message(20, 1500),
    ] {
        peer.send(&message, m::VERSION | m::NEED_REPLY);
    }
    // The next thing that comes is the answer to this.
    peer.get(m::GET_FEATURES);
    assert_eq!(peer.get(m::GET_STATUS), 1);
    session.leave();
}

#[test]
fn features_may_be_sent_twice_and_change_only_while_nothing_runs() {
    let session = Session::ready(false);
    let features = m::F_PROTOCOL_FEATURES | m::F_VERSION_1;
    session.peer.ok(&m::u64_message(m::SET_FEATURES, features));
    assert_eq!(session.next(), Event::Negotiated(features));
    session.run_vring(0, 0);
    session.peer.ok(&m::u64_message(m::SET_FEATURES, features));
    assert_eq!(session.next(), Event::Negotiated(features));
    let packed = m::u64_message(m::SET_FEATURES, features | m::F_RING_PACKED);
    session.peer.refused(&packed);
    session.quiet();
    session.peer.get_base(0);
    assert_eq!(session.next(), Event::Stop(0));
    session.peer.ok(&packed);
    assert_eq!(
        session.next(),
        Event::Negotiated(features | m::F_RING_PACKED)
    );
    session.leave();
}

#[test]
fn one_line_says_what_was_negotiated_and_comes_again_only_when_that_changed() {
    let session = Session::ready(true);
    let lines = || -> Vec<String> {
        let lines = session.log.try_iter();
        lines.filter(|line| line.contains("negotiated")).collect()
    };
    session.run_vring(0, 0x8000_8000);
    session.run_vring(1, 0x8000_8000);
    let first = lines();
    assert_eq!(first.len(), 1, "{first:?}");
    for part in [
        "negotiated device=disk0 rings=packed",
        "virtio=VIRTIO_F_VERSION_1,VIRTIO_F_RING_PACKED",
        "protocol=MQ,REPLY_ACK,CONFIG,RESET_DEVICE,CONFIGURE_MEM_SLOTS,STATUS",
    ] {
        assert!(first[0].contains(part), "{first:?}");
    }
    // A guest that reboots into the same driver, and then into another.
    for (features, count) in [(m::F_VERSION_1 | m::F_RING_PACKED, 0), (m::F_VERSION_1, 1)] {
        session.peer.ok(&m::u64_message(m::SET_STATUS, 0));
        let features = features | m::F_PROTOCOL_FEATURES;
        session.peer.ok(&m::u64_message(m::SET_FEATURES, features));
        session.events.try_iter().count();
        session.peer.ok(&m::enable(0, false));
        session.run_vring(0, 0);
        assert_eq!(lines().len(), count);
    }
    session.leave();
}

#[test]
fn queues_slots_and_config_space_are_told() {
    let session = Session::start(nic());
    session
        .peer
        .negotiate(m::F_PROTOCOL_FEATURES | m::F_VERSION_1, m::P_ALL);
    assert_eq!(session.peer.get(m::GET_QUEUE_NUM), 2);
    assert_eq!(session.peer.get(m::GET_MAX_MEM_SLOTS), 509);
    session.leave();

    let session = Session::ready(false);
    let peer = &session.peer;
    assert_eq!(peer.get(m::GET_QUEUE_NUM), 4);
    let config = |offset: u32, size: usize| {
        let body = peer.ask(&m::config(m::GET_CONFIG, offset, &vec![0; size]));
        body.unwrap()[12..].to_vec()
    };
    // Capacity in sectors (VIRTIO 1.3 §5.2.4); what lies beyond the fields reads as zero.
    assert_eq!(config(0, 8), 2048u64.to_le_bytes());
    assert_eq!(config(2048, 4), [0; 4]);
    assert_eq!(config(0, 8).len(), 8);
    peer.refused(&m::config(m::SET_CONFIG, 0, &[1]));
    assert_eq!(config(0, 8), 2048u64.to_le_bytes());
    let beyond = m::config(m::GET_CONFIG, 4090, &[0; 7]);
    assert_eq!(
        peer.ask(&beyond),
        None,
        "beyond the 4096 bytes of any config space"
    );
    let (end, clean) = session.end();
    assert!(end.starts_with("GET_CONFIG:"), "{end}");
    assert!(clean);
}

/// VIRTIO 1.3 §2.1: 0 resets the device.
#[test]
fn status_is_kept_and_0_resets_the_device() {
    let session = Session::ready(false);
    let peer = &session.peer;
    assert_eq!(peer.get(m::GET_STATUS), 0);
    peer.ok(&m::u64_message(m::SET_STATUS, 0xf));
    assert_eq!(peer.get(m::GET_STATUS), 0xf);
    peer.refused(&m::u64_message(m::SET_STATUS, 0x100));
    peer.refused(&Message::new(m::SET_STATUS, &[1]));
    assert_eq!(peer.get(m::GET_STATUS), 0xf);
    session.run_vring(0, 7);
    peer.ok(&m::u64_message(m::SET_STATUS, 0));
    assert_eq!(session.next(), Event::Stop(0));
    assert_eq!(peer.get(m::GET_STATUS), 0);
    // Guest memory stays; the vring has to be set up again, base included.
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 128));
    peer.ok(&m::addr(0));
    session.quiet();
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
    let started = session.next_start();
    assert_eq!((started.size, started.base), (128, None));
    session.leave();
}

/// QEMU 7.2 stops a card of several queue pairs one after another, for a pause as well, and says
/// that the status is 0 after the first: it asks then where the others stood and starts them there.
#[test]
fn where_a_reset_stopped_a_vring_can_be_asked() {
    let session = Session::ready(true);
    let peer = &session.peer;
    session.run_vring(0, 0x8005_8005);
    session.run_vring(1, 0x0007_8009);
    assert_eq!(peer.get_base(0), 0x8005_8005);
    assert_eq!(session.next(), Event::Stop(0));
    peer.ok(&m::u64_message(m::SET_STATUS, 0));
    assert_eq!(session.next(), Event::Stop(1));
    for _ in 0..2 {
        assert_eq!(peer.get_base(1), 0x0007_8009);
        assert_eq!(peer.get_base(0), 0x8005_8005);
        assert_eq!(peer.get_base(2), 0x8000_8000, "never started");
    }
    peer.ok(&m::u64_message(m::SET_STATUS, 1));
    assert_eq!(peer.get_base(1), 0x8000_8000, "the driver begins anew");
    // Who does not say where it starts has a fresh ring, as after any reset.
    peer.ok(&m::state(m::SET_VRING_NUM, 1, 128));
    peer.ok(&m::addr(1));
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 1, Some(&eventfd())));
    assert_eq!(session.next_start().base, None);
    session.leave();
}

#[test]
fn reset_device_stops_and_disables_every_vring() {
    let session = Session::ready(false);
    session.run_vring(0, 7);
    session.run_vring(2, 8);
    session.peer.ok(&Message::new(m::RESET_DEVICE, &[]));
    assert_eq!(session.next(), Event::Stop(0));
    assert_eq!(session.next(), Event::Stop(2));
    // Memory is still there; nothing of the vrings is left.
    session
        .peer
        .ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
    session.peer.ok(&m::enable(0, true));
    session.quiet();
    session.peer.ok(&m::enable(0, false));
    assert_eq!(session.run_vring(0, 9).base, Some(9));
    session.leave();
}

#[test]
fn reset_owner_is_ignored() {
    // Deprecated. Some back-ends took it for the end of the session, which broke front-ends.
    let session = Session::ready(false);
    session.run_vring(0, 7);
    session.peer.ok(&Message::new(m::RESET_OWNER, &[]));
    session.quiet();
    session.runner.advance(0, 9);
    assert_eq!(session.peer.get_base(0), 9);
    assert_eq!(session.next(), Event::Stop(0));
    assert!(session.leave().1);
}
