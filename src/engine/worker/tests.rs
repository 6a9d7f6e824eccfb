//! When the host's interfaces are in the worker's epoll: while it sleeps, and not for long after.

use std::time::Instant;

use super::hosts::TURNS_WATCHED;
use super::*;
use crate::engine::link::End;
use crate::host::sink::SinkPort;
use crate::host::tap::TapQueue;
use crate::host::xdp::XdpQueue;
use crate::sys::tap::Tap;
use crate::sys::testnet::{DEADLINE, ETHERTYPE, PacketSocket, VNET_HEADER, in_private_netns, ip};
use crate::sys::xdp::Xdp;

const ENOENT: i32 = 2;

/// A worker with a tap and an interface, on this thread.
fn worker(tap: &Tap, xdp: &Xdp) -> Worker {
    let ports = HostPorts {
        taps: vec![TapQueue::new(tap, 0).unwrap()],
        xdps: vec![XdpQueue::take(xdp).unwrap()],
    };
    let (retired, _) = crossbeam::channel::bounded(1);
    let config = WorkerConfig {
        core: cpu::online_cores().unwrap()[0],
        policy: IdlePolicy::Adaptive,
        slots: vec![Running::default()],
        links: vec![
            Link::new(End::Tap(0), End::Sink(SinkPort::new())),
            Link::new(End::Xdp(0), End::Vring(0)),
        ],
        inbounds: Vec::new(),
        ports,
        uring: UringNeed::Nothing,
        retired,
        mailbox: Arc::new(Mailbox::new().unwrap()),
        counters: Arc::default(),
    };
    Worker::new(config).unwrap()
}

/// Whether tap and interface are in its epoll, of which epoll itself is asked.
fn watched(worker: &Worker) -> [bool; 2] {
    [raw(&worker.ports.taps[0]), raw(&worker.ports.xdps[0])].map(|fd| {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        match worker.epoll.ctl(ControlOperation::Modify, fd, event) {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(ENOENT) => false,
            Err(error) => panic!("{error}"),
        }
    })
}

/// A message, so that the next sleep is none.
fn send_message(mailbox: &Mailbox) {
    mailbox
        .send(Command::Exit, Instant::now() + DEADLINE)
        .unwrap();
}

/// A tap, and one end of a cable.
fn interfaces() -> (Tap, Xdp) {
    ip("link add xa type veth peer name xb");
    ip("link set xa up");
    ip("link set xb up");
    let tap = Tap::open("tap0", 1, None).unwrap();
    (tap, Xdp::open("xa", 1, None).unwrap())
}

#[test]
fn interfaces_are_watched_by_a_worker_that_sleeps_and_let_be_by_one_that_stays_awake() {
    in_private_netns(|| {
        let (tap, xdp) = interfaces();
        let mut worker = worker(&tap, &xdp);
        send_message(&worker.cx.mailbox);
        assert_eq!(watched(&worker), [false, false], "it has not slept yet");
        for round in 0..3 {
            worker.park();
            assert!(worker.hosts_watched);
            assert_eq!(watched(&worker), [true, true], "round {round}");
            for turn in 1..TURNS_WATCHED {
                worker.stay_awake();
                assert!(worker.hosts_watched, "turn {turn}");
            }
            if round == 1 {
                // A sleep in between: all turns once more.
                worker.park();
                (1..TURNS_WATCHED).for_each(|_| worker.stay_awake());
            }
            assert_eq!(watched(&worker), [true, true], "round {round}");
            worker.stay_awake();
            assert!(!worker.hosts_watched);
            assert_eq!(watched(&worker), [false, false], "round {round}");
        }
    });
}

#[test]
fn a_frame_that_came_while_nobody_watched_ends_the_sleep() {
    in_private_netns(|| {
        let (tap, xdp) = interfaces();
        xdp.set_receiving(0, true).unwrap();
        let mut worker = worker(&tap, &xdp);
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend(ETHERTYPE);
        frame.resize(60, 7);
        for name in ["tap0", "xb"] {
            // The other one is quiet: what it had has ended a sleep before.
            send_message(&worker.cx.mailbox);
            worker.park();
            worker.obey();
            (0..TURNS_WATCHED).for_each(|_| worker.stay_awake());
            assert_eq!(watched(&worker), [false, false]);
            PacketSocket::bind(name).send(&[0; VNET_HEADER], &frame);
            // Ends a sleep that nothing else does, and is seen then.
            let (awake, late) = crossbeam::channel::bounded::<()>(1);
            let mailbox = Arc::clone(&worker.cx.mailbox);
            let guard = std::thread::spawn(move || {
                if late.recv_timeout(DEADLINE).is_err() {
                    send_message(&mailbox);
                }
            });
            worker.park();
            let _ = awake.send(());
            guard.join().unwrap();
            assert!(worker.cx.mailbox.is_empty(), "{name}: it slept on");
        }
    });
}
