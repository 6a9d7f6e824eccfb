//! One front-end after another on the same device, and the crate's own front-end.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vringd::control::session::{self, Served};
use vringd::sys::link::Wake;

use super::fake::{Event, FakeRunner};
use super::front_end::{Peer, RAM, Session, TIMEOUT, disk, eventfd, file, join};
use super::message as m;

/// Closes `socket` when the test takes too long: the crate's front-end waits for ever. The watch
/// ends when what this returns is dropped.
fn watch(socket: &UnixStream) -> Sender<()> {
    let socket = socket.try_clone().unwrap();
    let (alive, gone) = bounded(0);
    std::thread::spawn(move || {
        if gone.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    });
    alive
}

fn memory(file: &File, gpa: u64, size: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: m::UVA + gpa,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn areas() -> VringConfigData {
    VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: m::UVA,
        used_ring_addr: m::UVA + 0xe000,
        avail_ring_addr: m::UVA + 0xc000,
        log_addr: None,
    }
}

#[test]
fn the_crates_front_end_is_served_with_every_message_that_is_offered() {
    let session = Session::start(disk());
    let socket = session.peer.0.try_clone().unwrap();
    socket.set_read_timeout(None).unwrap();
    let watched = watch(&socket);
    let mut front = Frontend::from_stream(socket, 4);
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    let features = m::F_PROTOCOL_FEATURES | m::F_VERSION_1;
    assert_eq!(offered & features, features);
    front.set_features(features).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    assert_eq!(protocol.bits(), m::P_ALL | m::P_BACKEND_REQ);
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(front.get_queue_num().unwrap(), 4);
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    let (flags, capacity) = (VhostUserConfigFlags::WRITABLE, [0; 8]);
    let (_, bytes) = front.get_config(0, 8, flags, &capacity).unwrap();
    assert_eq!(bytes, 2048u64.to_le_bytes());
    front.set_config(0, flags, &[1]).unwrap_err();
    let (_channel, theirs) = UnixStream::pair().unwrap();
    front.set_backend_request_fd(&theirs).unwrap();

    let (ram, more) = (file(RAM), file(4096));
    front.set_mem_table(&[memory(&ram, 0, RAM)]).unwrap();
    let more = memory(&more, 1 << 30, 4096);
    front.add_mem_region(&more).unwrap();
    front.remove_mem_region(&more).unwrap();
    front.remove_mem_region(&more).unwrap_err();
    front.set_vring_num(0, 256).unwrap();
    front.set_vring_addr(0, &areas()).unwrap();
    front.set_vring_base(0, 9).unwrap();
    front.set_vring_kick(0, &eventfd()).unwrap();
    front.set_vring_call(0, &eventfd()).unwrap();
    front.set_vring_err(0, &eventfd()).unwrap();
    front.set_vring_enable(0, true).unwrap();
    assert_eq!(session.next(), Event::Negotiated(features));
    assert_eq!(session.next_start().base, Some(9));
    front.set_vring_enable(0, false).unwrap();
    assert_eq!(session.next(), Event::Pause(0, true));
    assert_eq!(front.get_vring_base(0).unwrap(), 9);
    assert_eq!(session.next(), Event::Stop(0));
    front.reset_device().unwrap();
    front.reset_owner().unwrap();
    drop((front, watched));
    assert!(session.leave().1);
}

/// Connections as the test makes them; none is the end, as when `exit` was written. Tells when
/// nobody can connect any more.
struct Connections(Receiver<Option<UnixStream>>, EventFd, Sender<()>);

impl session::FrontEnds for Connections {
    fn next(&mut self, _: &Wake) -> std::io::Result<Option<UnixStream>> {
        let next = self.0.recv().unwrap();
        if next.is_none() {
            self.1.write(1)?;
        }
        Ok(next)
    }

    fn close(&mut self) {
        self.2.send(()).unwrap();
    }
}

/// Everything that vring 0 needs, with its ring in `ram`.
fn run_first(peer: &Peer, ram: &File, base: u32) {
    let region = m::Region {
        gpa: 0,
        size: RAM,
        offset: 0,
        file: ram,
    };
    peer.negotiate(m::F_PROTOCOL_FEATURES | m::F_VERSION_1, m::P_ALL);
    peer.ok(&region.add());
    peer.ok(&m::enable(0, true));
    peer.ok(&m::state(m::SET_VRING_NUM, 0, 256));
    peer.ok(&m::addr(0));
    peer.ok(&m::state(m::SET_VRING_BASE, 0, base));
    peer.ok(&m::vring_fd(m::SET_VRING_KICK, 0, Some(&eventfd())));
}

/// A front-end whose call fd a worker slept in has no session any more, and gets no other at once:
/// not when the bell rings, nor when it hangs up before.
#[test]
fn a_front_end_that_held_a_worker_up_is_not_served_again_at_once() {
    for hangs_up in [false, true] {
        let device = disk();
        let (runner, events) = FakeRunner::new(device.vrings_max());
        let fake = Arc::clone(&runner);
        let served = Served { device, runner };
        let (connect, connections) = unbounded::<Option<UnixStream>>();
        let (close, closed) = unbounded();
        let exit = eventfd();
        let waiting = connections.clone();
        let accept = Box::new(Connections(connections, exit.try_clone().unwrap(), close));
        let link = session::Link::default();
        let thread = session::spawn(served, accept, link, exit.try_clone().unwrap()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        connect.send(Some(theirs)).unwrap();
        let peer = Peer::new(ours);
        run_first(&peer, &file(RAM), 0);
        let mut peer = Some(peer);
        let next = || events.recv_timeout(TIMEOUT).unwrap();
        while !matches!(next(), Event::Start(_)) {}
        fake.blocking.store(true, SeqCst);
        match hangs_up {
            true => drop(peer.take()),
            false => fake.bell.write(1).unwrap(),
        }
        assert_eq!(next(), Event::Stop(0));
        if let Some(peer) = peer {
            assert_eq!(
                (&peer.0).read(&mut [0]).unwrap(),
                0,
                "its connection is closed"
            );
        }
        // It waits here: nobody is asked for the next connection, and the exit is obeyed.
        closed.recv_timeout(TIMEOUT).unwrap();
        let (_again, theirs) = UnixStream::pair().unwrap();
        connect.send(Some(theirs)).unwrap();
        exit.write(1).unwrap();
        assert!(join(thread), "everything was stopped");
        assert!(!fake.blocking.load(SeqCst), "it is forgotten");
        assert_eq!(waiting.len(), 1, "nobody was served");
    }
}

#[test]
fn one_front_end_after_another_is_served_and_the_second_waits_for_the_first() {
    let device = disk();
    let (runner, events) = FakeRunner::new(device.vrings_max());
    let served = Served { device, runner };
    let (connect, connections) = unbounded::<Option<UnixStream>>();
    let exit = eventfd();
    let (close, _closed) = unbounded();
    let accept = Box::new(Connections(connections, exit.try_clone().unwrap(), close));
    let link = session::Link::default();
    let thread = session::spawn(served, accept, link, exit.try_clone().unwrap()).unwrap();
    let ram = file(RAM);
    let mut peers: Vec<Peer> = Vec::new();
    for _ in 0..3 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        connect.send(Some(theirs)).unwrap();
        peers.push(Peer::new(ours));
    }
    for (number, peer) in peers.into_iter().enumerate() {
        let base = u32::try_from(number).unwrap();
        run_first(&peer, &ram, base);
        // Gone without a word, as after SIGKILL.
        drop(peer);
        let next = || events.recv_timeout(TIMEOUT).unwrap();
        assert!(matches!(next(), Event::Negotiated(_)));
        assert!(matches!(next(), Event::Start(started) if started.base == Some(base)));
        assert_eq!(next(), Event::Stop(0));
    }
    connect.send(None).unwrap();
    assert!(join(thread), "everything was stopped");
    assert_eq!(events.recv_timeout(Duration::ZERO).ok(), None);
}
