//! Sessions over a socket pair: the `vhost` crate's front-end side, and raw bytes where that is too
//! polite. The engine is a recorder.

mod basic;
mod hostile;

use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempfile::TempFile;

use super::SessionEnd;
use super::session::{Served, serve};
use crate::device::{ConfigWriteError, DeviceKind, DeviceModel};
use crate::engine::{EngineError, VringAddr, VringRunner, VringSetup};
use crate::memory::GuestRam;

const MIB: u64 = 1 << 20;
const UVA: u64 = 0x7000_0000_0000;
const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const PROTOCOL: u64 = 1 << 30;
const NEED_REPLY: u32 = 8;

#[derive(Debug)]
struct TestDevice;

impl DeviceModel for TestDevice {
    fn name(&self) -> &str {
        "test0"
    }
    fn kind(&self) -> DeviceKind {
        DeviceKind::Blk
    }
    fn features(&self) -> u64 {
        VERSION_1 | PACKED | (1 << 9)
    }
    fn vrings_max(&self) -> u16 {
        4
    }
    fn queues_max(&self) -> u16 {
        4
    }
    fn config(&self) -> Vec<u8> {
        (0..60).collect()
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        Err(ConfigWriteError {
            offset,
            len: bytes.len(),
            size: 60,
        })
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// What the engine was asked.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Start {
        index: u16,
        size: u16,
        features: u64,
        base: Option<u32>,
        kick: bool,
    },
    Stop(u16),
    Pause(u16, bool),
    Call(u16),
    Swap(u16, usize),
    Negotiated(u64),
}

/// Records; a vring stops where `base` says.
#[derive(Debug)]
struct Recorder {
    asked: Sender<Asked>,
    base: u32,
}

impl Recorder {
    fn note(&self, asked: Asked) {
        self.asked.send(asked).expect("the test listens");
    }
}

impl VringRunner for Recorder {
    fn start(&self, setup: VringSetup) -> Result<(), EngineError> {
        let VringSetup {
            index,
            size,
            features,
            base,
            addr,
            ram,
            kick,
            ..
        } = setup;
        ram.area(addr.desc, usize::from(size) * 16, 16)
            .map_err(|source| EngineError::Memory { index, source })?;
        self.note(Asked::Start {
            index,
            size,
            features,
            base,
            kick: kick.is_some(),
        });
        Ok(())
    }
    fn stop(&self, index: u16) -> Result<u32, EngineError> {
        self.note(Asked::Stop(index));
        Ok(self.base)
    }
    fn pause(&self, index: u16, paused: bool) -> Result<(), EngineError> {
        self.note(Asked::Pause(index, paused));
        Ok(())
    }
    fn set_call(
        &self,
        index: u16,
        _call: Option<EventFd>,
        _err: Option<EventFd>,
    ) -> Result<(), EngineError> {
        self.note(Asked::Call(index));
        Ok(())
    }
    fn swap(&self, index: u16, ram: Arc<GuestRam>, addr: VringAddr) -> Result<(), EngineError> {
        ram.area(addr.desc, 16, 16)
            .map_err(|source| EngineError::Memory { index, source })?;
        self.note(Asked::Swap(index, ram.len()));
        Ok(())
    }
    fn negotiated(&self, features: u64) -> std::io::Result<()> {
        self.note(Asked::Negotiated(features));
        Ok(())
    }
}

/// A device whose engine records, stopping at `base`.
fn device(base: u32) -> (Served, Receiver<Asked>) {
    let (asked, told) = channel();
    let runner = Arc::new(Recorder { asked, base });
    (
        Served {
            device: Arc::new(TestDevice),
            runner,
        },
        told,
    )
}

/// One session in a thread of its own, and the front-end's end of its socket.
struct Rig {
    socket: UnixStream,
    told: Receiver<Asked>,
    served: Served,
    thread: Option<JoinHandle<SessionEnd>>,
    exit: EventFd,
}

impl Rig {
    fn new() -> Rig {
        let (served, told) = device(0x8046_804d);
        Rig::on(served, told)
    }

    fn on(served: Served, told: Receiver<Asked>) -> Rig {
        let (socket, theirs) = UnixStream::pair().unwrap();
        // A session that does not answer fails the test instead of hanging it.
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let exit = EventFd::new(EFD_NONBLOCK).unwrap();
        let (to_serve, ends) = (served.clone(), exit.try_clone().unwrap());
        let thread = std::thread::spawn(move || serve(&to_serve, theirs, &ends).0);
        Rig {
            socket,
            told,
            served,
            thread: Some(thread),
            exit,
        }
    }

    /// Sends a message of this version with these fds.
    fn send_with(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        let mut bytes = Vec::new();
        for word in [request, 1 | flags, u32::try_from(body.len()).unwrap()] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        self.socket.send_with_fds(&[&bytes[..]], fds).unwrap();
    }

    /// Sends a message and waits for its acknowledgement: 0 is yes.
    fn ask(&self, request: u32, body: &[u8], fds: &[RawFd]) -> u64 {
        self.send_with(request, NEED_REPLY, body, fds);
        self.reply_u64(request)
    }

    fn reply(&self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).expect("an answer");
        let word = |at: usize| u32::from_ne_bytes(core::array::from_fn(|i| header[at + i]));
        assert_eq!(
            (word(0), word(4)),
            (request, 5),
            "an answer to another message"
        );
        let mut body = vec![0; word(8) as usize];
        (&self.socket).read_exact(&mut body).unwrap();
        body
    }

    fn reply_u64(&self, request: u32) -> u64 {
        u64::from_ne_bytes(self.reply(request).try_into().expect("eight bytes"))
    }

    /// GET_FEATURES … SET_PROTOCOL_FEATURES with everything offered.
    fn negotiate(&self) -> u64 {
        self.send_with(3, 0, &[], &[]);
        self.send_with(1, 0, &[], &[]);
        let features = self.reply_u64(1);
        self.send_with(15, 0, &[], &[]);
        let protocol = self.reply_u64(15);
        self.send_with(16, 0, &protocol.to_ne_bytes(), &[]);
        self.send_with(2, 0, &features.to_ne_bytes(), &[]);
        features
    }

    fn next(&self) -> Asked {
        self.told
            .recv_timeout(Duration::from_secs(5))
            .expect("the engine is asked")
    }

    /// Closes the socket; how the session ended.
    fn close(mut self) -> (SessionEnd, Served, Receiver<Asked>) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let end = self
            .thread
            .take()
            .unwrap()
            .join()
            .expect("the session does not panic");
        let (_, unused) = channel();
        let told = core::mem::replace(&mut self.told, unused);
        (end, self.served.clone(), told)
    }

    /// How the session ended by itself.
    fn ended(mut self) -> SessionEnd {
        self.thread
            .take()
            .unwrap()
            .join()
            .expect("the session does not panic")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.exit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A file to be guest memory.
fn memory(bytes: u64) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

/// A memory region's description.
fn region(gpa: u64, size: u64) -> Vec<u8> {
    [gpa, size, UVA.wrapping_add(gpa), 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// ADD_MEM_REG or REM_MEM_REG.
fn single(gpa: u64, size: u64) -> Vec<u8> {
    [0u64.to_ne_bytes().to_vec(), region(gpa, size)].concat()
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

fn addr(index: u32) -> Vec<u8> {
    let mut body = state(index, 0);
    let base = UVA + u64::from(index) * 0x10000;
    // descriptor, used, available, log
    for word in [base, base + 0x2000, base + 0x1000, 0] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    body
}

/// Everything that vring `index` needs but memory and features.
fn set_up_vring(rig: &Rig, index: u32, size: u32) {
    assert_eq!(rig.ask(8, &state(index, size), &[]), 0);
    assert_eq!(rig.ask(10, &state(index, 0), &[]), 0);
    assert_eq!(rig.ask(9, &addr(index), &[]), 0);
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let word = u64::from(index).to_ne_bytes();
    assert_eq!(rig.ask(13, &word, &[call.as_raw_fd()]), 0);
    assert_eq!(rig.ask(12, &word, &[kick.as_raw_fd()]), 0);
}
