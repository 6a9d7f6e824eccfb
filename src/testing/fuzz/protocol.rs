//! A front-end that says anything, with any descriptor.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crossbeam::channel::bounded;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::control::session::{Served, serve};
use crate::device::net::{LinkInfo, NetModel, NetOptions, Offloads};
use crate::device::{DeviceModel, RingOptions};
use crate::engine::{EngineError, VringAddr, VringRunner, VringSetup};
use crate::memory::{GuestRam, memfd};
use crate::ring::{Areas, Split};

use super::Bytes;

/// Messages in one input at most: what they are answered must fit the socket.
const MESSAGES_MAX: usize = 64;
/// A session that has not ended so long after its front-end has hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Waits that the patience is made of.
const STEPS: u32 = 100;
/// Bytes of guest memory behind a descriptor.
const MEMORY: u64 = 1 << 20;

/// What an input begins with whose engine does not do all that it is asked for; behind it which of
/// the first sixteen things, in turns, a bit each.
const FAILS: u8 = 0xfe;

/// Plays `data` to a session. Returns how many messages and pieces were sent.
///
/// # Panics
/// When something does not hold.
pub fn protocol(data: &[u8]) -> usize {
    let before = open_descriptors();
    let sent = play(data);
    assert_eq!(
        open_descriptors(),
        before,
        "a session leaves descriptors open"
    );
    sent
}

/// Descriptors that are open; beside other tests, only those of kinds that they have none of.
fn open_descriptors() -> usize {
    let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else {
        return 0;
    };
    let counts = |entry: &std::fs::DirEntry| {
        let link = std::fs::read_link(entry.path()).unwrap_or_default();
        let link = link.to_string_lossy();
        cfg!(fuzzing) || link.starts_with("socket:") || link.contains("eventfd")
    };
    descriptors.flatten().filter(counts).count()
}

fn play(data: &[u8]) -> usize {
    let model = NetModel::new(NetOptions {
        name: "net0".into(),
        queue_pairs: 2,
        mac: None,
        mtu: None,
        offloads: Offloads::CSUM_TSO,
        // Its config space changes, which a front-end may want to be told.
        link: LinkInfo {
            has_status: true,
            ..LinkInfo::default()
        },
        rings: RingOptions::default(),
    });
    let (fails, data) = match *data {
        [FAILS, low, high, ref rest @ ..] => (u16::from_le_bytes([low, high]), rest),
        _ => (0, data),
    };
    let served = Served {
        device: Arc::new(model) as Arc<dyn DeviceModel>,
        runner: Arc::new(Runner {
            fails,
            asked: AtomicU32::new(0),
        }),
    };
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let exit = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (ended, end) = bounded(1);
    let session = std::thread::spawn(move || {
        serve(&served, theirs, &exit);
        // Whoever waits has given up when nobody listens.
        let _ = ended.send(());
    });
    let sent = send_all(&ours, data);
    let _ = ours.shutdown(std::net::Shutdown::Write);
    // In steps: if all of us are stopped for a while, one of them is over and not the patience.
    let mut ends = (0..STEPS).map(|_| end.recv_timeout(PATIENCE / STEPS));
    assert!(ends.any(|end| end.is_ok()), "the session hangs");
    session.join().expect("the session does not panic");
    sent
}

/// What goes along with a message.
fn descriptor(kind: u8) -> Option<OwnedFd> {
    let memory = |bytes| memfd(bytes).ok().map(OwnedFd::from);
    match kind % 8 {
        0 | 1 => None,
        2 => memory(MEMORY),
        3 => memory(4096),
        4 => memory(0),
        5 => {
            let event = EventFd::new(EFD_NONBLOCK).ok()?;
            Some(copy(&event).ok()?)
        }
        6 => Some(UnixStream::pair().ok()?.0.into()),
        _ => Some(File::open("/dev/null").ok()?.into()),
    }
}

/// Another descriptor for what `fd` names: eventfds have no other way that is not their own.
fn copy(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.send_with_fd(&[0u8][..], fd.as_raw_fd())?;
    let (_, file) = theirs.recv_with_fd(&mut [0])?;
    file.map(OwnedFd::from)
        .ok_or_else(|| io::Error::other("no descriptor came"))
}

fn send_all(socket: &UnixStream, data: &[u8]) -> usize {
    let mut bytes = Bytes(data);
    let mut sent = 0;
    while !bytes.is_empty() && sent < MESSAGES_MAX {
        let kind = bytes.u8();
        let ok = if kind == u8::MAX {
            // Not a message at all.
            let count = usize::from(bytes.u8());
            let rest = &bytes.0[..count.min(bytes.0.len())];
            bytes.0 = &bytes.0[rest.len()..];
            (&*socket).write_all(rest).is_ok()
        } else {
            send_message(socket, kind, &mut bytes)
        };
        if !ok {
            break;
        }
        sent += 1;
    }
    sent
}

/// A message with a header that is right as to its form: request, flags, length of the body, what
/// goes along, body.
fn send_message(socket: &UnixStream, request: u8, bytes: &mut Bytes<'_>) -> bool {
    let (flags, len, kinds) = (bytes.u8(), usize::from(bytes.u16() % 512), bytes.u8());
    let body = &bytes.0[..len.min(bytes.0.len())];
    bytes.0 = &bytes.0[body.len()..];
    let fds: Vec<OwnedFd> = [kinds & 7, kinds >> 3 & 7, kinds >> 6]
        .into_iter()
        .filter_map(descriptor)
        .collect();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let header = [u32::from(request), u32::from(flags), body.len() as u32];
    let mut message: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
    message.extend(body);
    socket.send_with_fds(&[&message[..]], &raw).is_ok()
}

/// A message as [`protocol`] reads it: what goes along is a kind of descriptor in each three bits.
fn message(request: u8, body: &[u8], kinds: u8) -> Vec<u8> {
    // Version 1, and an answer is wanted.
    let mut bytes = vec![request, 9];
    bytes.extend((body.len() as u16).to_le_bytes());
    bytes.push(kinds);
    bytes.extend(body);
    bytes
}

/// Where guest memory is in the front-end's address space.
const FRONT_END: u64 = 0x7f00_0000_0000;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn state(request: u8, index: u32, num: u32) -> Vec<u8> {
    message(
        request,
        &words(&[u64::from(index) | u64::from(num) << 32]),
        0,
    )
}

/// The protocol features of every session, and BACKEND_REQ.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16;
const BACKEND_REQ: u64 = 1 << 5;

/// What every session begins with: features, owner, protocol features, number of queues.
fn beginning() -> Vec<u8> {
    let protocol = [PROTOCOL];
    [
        message(1, &[], 0),
        message(3, &[], 0),
        message(15, &[], 0),
        message(16, &words(&protocol), 0),
        message(17, &[], 0),
        message(2, &words(&[1 << 30 | 1 << 32]), 0),
    ]
    .concat()
}

/// Size, base, addresses, descriptors and enable of a vring.
fn vring(index: u32) -> Vec<u8> {
    let at = FRONT_END + u64::from(index) * 0x1_0000;
    let addr = [u64::from(index), at, at + 0xe000, at + 0xc000, 0];
    [
        state(8, index, 256),
        state(10, index, 0),
        message(9, &words(&addr), 0),
        message(12, &words(&[u64::from(index)]), 5),
        message(13, &words(&[u64::from(index)]), 5),
        message(14, &words(&[u64::from(index) | 0x100]), 0),
        state(18, index, 1),
    ]
    .concat()
}

/// Disable, and GET_VRING_BASE.
fn end(index: u32) -> Vec<u8> {
    [state(18, index, 0), state(11, index, 0)].concat()
}

/// Sessions to begin with, by name: what each request is by number is in vhost-user, "Front-end
/// message types".
pub fn protocol_seeds() -> Vec<(String, Vec<u8>)> {
    let begin = beginning();
    let region = [0, MEMORY, FRONT_END, 0];
    let table = |kind| message(5, &words(&[&[1][..], &region].concat()), kind);
    let add = message(37, &words(&[&[0][..], &region].concat()), 2);
    let remove = message(38, &words(&[&[0][..], &region].concat()), 0);
    let config = [0u32, 12, 0].map(u32::to_ne_bytes).concat();
    let rest = [
        message(24, &[&config[..], &[0; 12]].concat(), 0),
        message(40, &[], 0),
        message(39, &words(&[15]), 0),
        message(34, &[], 0),
        message(36, &[], 0),
    ]
    .concat();
    let (first, second) = (vring(0), vring(1));
    // Two kinds of descriptor along with a message that takes none.
    let stray = message(20, &[0; 8], 5 | 6 << 3);
    // A channel that is told what changes, twice, and something else in its place.
    let channel = [
        message(16, &words(&[PROTOCOL | BACKEND_REQ]), 0),
        message(21, &[], 6),
        message(21, &[], 6),
        message(21, &[], 2),
        message(21, &[], 0),
    ]
    .concat();
    let seeds: [(&str, &[&[u8]]); 6] = [
        ("channel", &[&channel, &table(2), &first, &rest, &end(0)]),
        (
            "whole",
            &[&table(2), &first, &second, &rest, &end(0), &end(1)],
        ),
        ("hot", &[&add, &second, &add, &remove, &end(1), &remove]),
        ("stray", &[&stray]),
        ("small", &[&table(3), &first]),
        ("garbage", &[&[u8::MAX, 40], &[0x55; 40]]),
    ];
    let seed =
        |(name, parts): (&str, &[&[u8]])| (name.to_owned(), [&begin, &parts.concat()[..]].concat());
    let mut seeds: Vec<_> = seeds.into_iter().map(seed).collect();
    // The first vring starts; what fails is another table for it, its pause, and a stop.
    let calls = message(13, &words(&[0]), 5);
    for (name, fails) in [
        ("no-start", 0b1),
        ("no-table", 0b10),
        ("no-call", 0b100),
        ("no-pause", 0b1000),
        ("no-stop", 0b1_0000),
    ] {
        let parts = [&[FAILS, fails, 0], &begin[..], &table(2), &first, &table(2)];
        let parts = [&parts.concat()[..], &calls, &end(0), &first, &rest].concat();
        seeds.push((name.to_owned(), parts));
    }
    seeds
}

/// Takes vrings whose areas are in memory and forgets them; stops each somewhere else. Does not do
/// what it was told to fail in.
#[derive(Debug)]
struct Runner {
    /// The nth thing that it is asked for, of sixteen in turns, is not done where this bit is set.
    fails: u16,
    asked: AtomicU32,
}

impl Runner {
    /// The number of what it is asked for, if that is to be done.
    fn next(&self, index: u16) -> Result<u32, EngineError> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        if self.fails >> (number % 16) & 1 == 0 {
            Ok(number)
        } else {
            let waited_ms = 0;
            Err(EngineError::Timeout { index, waited_ms })
        }
    }
}

fn find(index: u16, size: u16, ram: &Arc<GuestRam>, at: VringAddr) -> Result<(), EngineError> {
    Areas::find::<Split>(ram, size, at.desc, at.driver, at.device)
        .map(drop)
        .map_err(|source| EngineError::Memory { index, source })
}

impl VringRunner for Runner {
    fn start(&self, setup: VringSetup) -> Result<(), EngineError> {
        self.next(setup.index)?;
        find(setup.index, setup.size, &setup.ram, setup.addr)
    }

    fn stop(&self, index: u16) -> Result<u32, EngineError> {
        // Any base is one that a packed ring can stand at, if not a split one.
        Ok(self.next(index)?.wrapping_mul(0x9e37_79b1))
    }

    fn pause(&self, index: u16, _paused: bool) -> Result<(), EngineError> {
        self.next(index).map(drop)
    }

    fn set_call(
        &self,
        index: u16,
        _call: Option<EventFd>,
        _err: Option<EventFd>,
    ) -> Result<(), EngineError> {
        self.next(index).map(drop)
    }

    fn swap(&self, index: u16, ram: Arc<GuestRam>, addr: VringAddr) -> Result<(), EngineError> {
        self.next(index)?;
        find(index, 1, &ram, addr)
    }

    fn negotiated(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }
}
