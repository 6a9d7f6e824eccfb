//! One session under test: a thread that serves it, and the front-end's end of its socket.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vringd::control::session::{Served, serve};
use vringd::device::blk::{BlkModel, BlkSetup};
use vringd::device::net::{LinkInfo, NetModel, NetOptions, Offloads};
use vringd::device::{DeviceModel, RingOptions};
use vringd::memory::memfd;

use super::fake::{Event, FakeRunner, Started};
use super::message::{self as m, Message, Region};

/// For whatever the back-end does by itself.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of guest memory: room for the rings of eight vrings.
pub const RAM: u64 = 8 * m::STRIDE;

pub fn disk() -> Arc<dyn DeviceModel> {
    disk_with(RingOptions::default())
}

pub fn disk_with(rings: RingOptions) -> Arc<dyn DeviceModel> {
    Arc::new(BlkModel::new(BlkSetup {
        rings,
        name: "disk0".into(),
        capacity_bytes: 1 << 20,
        block_size: 512,
        queues: 4,
        read_only: false,
        serial: "serial".into(),
        ..BlkSetup::default()
    }))
}

pub fn nic() -> Arc<dyn DeviceModel> {
    Arc::new(NetModel::new(NetOptions {
        rings: RingOptions::default(),
        name: "net0".into(),
        queue_pairs: 2,
        mac: None,
        mtu: None,
        offloads: Offloads::CSUM_TSO,
        link: LinkInfo::default(),
    }))
}

/// A file in memory of `bytes` zeros.
pub fn file(bytes: u64) -> File {
    memfd(bytes).unwrap()
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// The front-end's end of a connection.
pub struct Peer(pub UnixStream);

impl Peer {
    pub fn new(socket: UnixStream) -> Peer {
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        Peer(socket)
    }

    pub fn send(&self, message: &Message, flags: u32) {
        assert!(self.try_send(message, flags), "the connection is closed");
    }

    /// Whether the message could be sent: not if the session has ended.
    pub fn try_send(&self, message: &Message, flags: u32) -> bool {
        let fds: Vec<RawFd> = message.fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let bytes = message.bytes(flags);
        let sent = self.0.send_with_fds(&[&bytes[..]], &fds);
        sent.inspect(|sent| assert_eq!(*sent, bytes.len())).is_ok()
    }

    pub fn write(&self, bytes: &[u8]) {
        (&self.0).write_all(bytes).unwrap();
    }

    /// The body of the next message, which must be the reply to `request`; `None` when the
    /// connection is closed.
    pub fn receive(&self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        match (&self.0).read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("no reply to request {request} within {TIMEOUT:?}")
            }
            Err(_) => return None,
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), request, "reply to another request");
        assert_eq!(word(4), m::VERSION | m::REPLY, "flags of a reply");
        let mut body = vec![0; word(8) as usize];
        (&self.0).read_exact(&mut body).unwrap();
        Some(body)
    }

    fn receive_u64(&self, request: u32) -> u64 {
        let body = self.receive(request).expect("the connection is open");
        u64::from_ne_bytes(body.try_into().unwrap())
    }

    /// Sends a request that has a reply of its own.
    pub fn ask(&self, message: &Message) -> Option<Vec<u8>> {
        self.send(message, m::VERSION);
        self.receive(message.request)
    }

    pub fn get(&self, request: u32) -> u64 {
        self.send(&Message::new(request, &[]), m::VERSION);
        self.receive_u64(request)
    }

    pub fn get_base(&self, index: u32) -> u32 {
        let body = self.ask(&m::state(m::GET_VRING_BASE, index, 0)).unwrap();
        assert_eq!(body[..4], index.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }

    /// Sends with NEED_REPLY; the value of the answer.
    pub fn ack(&self, message: &Message) -> u64 {
        self.send(message, m::VERSION | m::NEED_REPLY);
        self.receive_u64(message.request)
    }

    #[track_caller]
    pub fn ok(&self, message: &Message) {
        assert_eq!(self.ack(message), 0, "request {} refused", message.request);
    }

    #[track_caller]
    pub fn refused(&self, message: &Message) {
        assert_ne!(self.ack(message), 0, "request {} taken", message.request);
    }

    /// Sends without NEED_REPLY, and waits until it was served.
    pub fn tell(&self, message: &Message) {
        self.send(message, m::VERSION);
        self.get(m::GET_FEATURES);
    }

    /// SET_OWNER, features and protocol features, all acknowledged as given.
    pub fn negotiate(&self, features: u64, protocol: u64) {
        let offered = self.get(m::GET_FEATURES);
        assert_eq!(features & !offered, 0, "not offered");
        let offered = self.get(m::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol & !offered, 0, "not offered");
        self.tell(&m::u64_message(m::SET_PROTOCOL_FEATURES, protocol));
        self.tell(&Message::new(m::SET_OWNER, &[]));
        self.tell(&m::u64_message(m::SET_FEATURES, features));
    }
}

/// Collects log lines.
struct LogLines(Sender<String>);

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A session on a thread of its own.
pub struct Session {
    pub peer: Peer,
    pub runner: Arc<FakeRunner>,
    pub events: Receiver<Event>,
    pub exit: EventFd,
    pub log: Receiver<String>,
    /// Guest memory: one region at guest physical address 0.
    pub ram: File,
    pub thread: JoinHandle<(String, bool)>,
    /// The kernel's number of that thread.
    pub thread_id: u64,
}

impl Session {
    /// A new connection to `device`.
    pub fn start(device: Arc<dyn DeviceModel>) -> Session {
        let (runner, events) = FakeRunner::new(device.vrings_max());
        let served = Served {
            device,
            runner: runner.clone(),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let exit = eventfd();
        let told = exit.try_clone().unwrap();
        let (lines, log) = unbounded();
        let (tell_id, id) = unbounded();
        let thread = std::thread::spawn(move || {
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            let number = link.file_name().unwrap().to_str().unwrap().parse();
            tell_id.send(number.unwrap()).unwrap();
            let subscriber = tracing_subscriber::fmt()
                .with_writer(move || LogLines(lines.clone()))
                .with_ansi(false)
                .finish();
            tracing::subscriber::with_default(subscriber, || {
                let (end, clean) = serve(&served, theirs, &told);
                (end.to_string(), clean)
            })
        });
        Session {
            peer: Peer::new(ours),
            runner,
            events,
            exit,
            log,
            ram: file(RAM),
            thread,
            thread_id: id.recv_timeout(TIMEOUT).unwrap(),
        }
    }

    /// A disk with everything negotiated, packed or split, and its memory set.
    pub fn ready(packed: bool) -> Session {
        Session::ready_with(packed, RingOptions::default())
    }

    /// The same of a disk with these options.
    pub fn ready_with(packed: bool, rings: RingOptions) -> Session {
        let session = Session::start(disk_with(rings));
        let format = if packed { m::F_RING_PACKED } else { 0 };
        let features = m::F_PROTOCOL_FEATURES | m::F_VERSION_1 | format;
        session.peer.negotiate(features, m::P_ALL);
        session.peer.ok(&m::mem_table(&[session.region()]));
        assert_eq!(session.next(), Event::Negotiated(features));
        session
    }

    pub fn region(&self) -> Region<'_> {
        let file = &self.ram;
        let (gpa, size, offset) = (0, RAM, 0);
        Region {
            gpa,
            size,
            offset,
            file,
        }
    }

    /// Everything that vring `index` needs, enabled last.
    pub fn run_vring(&self, index: u32, base: u32) -> Started {
        let peer = &self.peer;
        peer.ok(&m::state(m::SET_VRING_NUM, index, 256));
        peer.ok(&m::state(m::SET_VRING_BASE, index, base));
        peer.ok(&m::addr(index));
        peer.ok(&m::vring_fd(m::SET_VRING_KICK, index, Some(&eventfd())));
        self.quiet();
        peer.ok(&m::enable(index, true));
        self.next_start()
    }

    /// Waits for a log line with `part` in it. Lines before it are passed over.
    #[track_caller]
    pub fn logged(&self, part: &str) -> String {
        loop {
            match self.log.recv_timeout(TIMEOUT) {
                Ok(line) if line.contains(part) => return line,
                Ok(_) => {}
                Err(_) => panic!("no log line with {part:?}"),
            }
        }
    }

    /// The next thing that the engine was asked for.
    #[track_caller]
    pub fn next(&self) -> Event {
        self.events.recv_timeout(TIMEOUT).unwrap()
    }

    #[track_caller]
    pub fn next_start(&self) -> Started {
        match self.next() {
            Event::Start(started) => started,
            other => panic!("{other:?} instead of a start"),
        }
    }

    /// The engine was asked for nothing more. For use after an answer: what a message asks of the
    /// engine is asked before it is answered.
    #[track_caller]
    pub fn quiet(&self) {
        let asked: Vec<_> = self.events.try_iter().collect();
        assert_eq!(asked, []);
    }

    /// The front-end goes away. How the session ended, and whether every vring was stopped.
    pub fn leave(self) -> (String, bool) {
        let Session { peer, thread, .. } = self;
        drop(peer);
        join(thread)
    }

    /// How the session ends without anything more from the front-end, which stays connected.
    pub fn end(self) -> (String, bool) {
        let Session { peer, thread, .. } = self;
        let end = join(thread);
        drop(peer);
        end
    }
}

/// What a session's thread returns; it must be about to.
pub fn join<T>(thread: JoinHandle<T>) -> T {
    crate::support::deadline::wait_until("the session ends", TIMEOUT, || {
        thread.is_finished().then_some(())
    });
    thread.join().unwrap()
}
