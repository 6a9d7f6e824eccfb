//! vhost-user messages as bytes, built by hand.
//!
//! The `vhost` crate's front-end can't say everything that real ones say (a 32-bit vring base, a
//! vring without a kick fd, SET_STATUS) and nothing that is wrong. vhost-user: "Message
//! Specification".

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const RESET_OWNER: u32 = 4;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
pub const SET_STATUS: u32 = 39;
pub const GET_STATUS: u32 = 40;

pub const VERSION: u32 = 1;
pub const REPLY: u32 = 4;
pub const NEED_REPLY: u32 = 8;

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_RING_PACKED: u64 = 1 << 34;
/// Protocol feature REPLY_ACK.
pub const P_REPLY_ACK: u64 = 1 << 3;
/// Protocol feature BACKEND_REQ: a disk tells on that channel that it has grown.
pub const P_BACKEND_REQ: u64 = 1 << 5;
/// Protocol features that every back-end of ours offers: MQ, REPLY_ACK, CONFIG, RESET_DEVICE,
/// CONFIGURE_MEM_SLOTS, STATUS.
pub const P_ALL: u64 = 1 | P_REPLY_ACK | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16;

/// Front-end address of guest physical address 0.
pub const UVA: u64 = 0x7f00_0000_0000;
/// Guest memory per vring in these tests.
pub const STRIDE: u64 = 0x1_0000;

/// A request with its descriptors, which stay open here.
#[derive(Clone)]
pub struct Message {
    pub request: u32,
    pub body: Vec<u8>,
    pub fds: Vec<Rc<OwnedFd>>,
}

impl Message {
    pub fn new(request: u32, body: &[u8]) -> Message {
        let (body, fds) = (body.to_vec(), Vec::new());
        Message { request, body, fds }
    }

    pub fn with(mut self, fd: &impl AsRawFd) -> Message {
        self.fds.push(Rc::new(copy(fd)));
        self
    }

    /// The same for another vring.
    pub fn for_vring(mut self, index: u32) -> Message {
        self.body[..4].copy_from_slice(&index.to_ne_bytes());
        self
    }

    pub fn bytes(&self, flags: u32) -> Vec<u8> {
        let size = u32::try_from(self.body.len()).unwrap();
        let mut bytes = Vec::new();
        for word in [self.request, flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Another descriptor for what `fd` names.
fn copy(fd: &impl AsRawFd) -> OwnedFd {
    // Through a socket: eventfds have no other way to be copied that is not their own.
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.send_with_fd(&[0u8][..], fd.as_raw_fd()).unwrap();
    let (_, file) = theirs.recv_with_fd(&mut [0]).unwrap();
    file.unwrap().into()
}

pub fn u64_message(request: u32, value: u64) -> Message {
    Message::new(request, &value.to_ne_bytes())
}

pub fn state(request: u32, index: u32, num: u32) -> Message {
    let body = [index.to_ne_bytes(), num.to_ne_bytes()].concat();
    Message::new(request, &body)
}

pub fn enable(index: u32, on: bool) -> Message {
    state(SET_VRING_ENABLE, index, u32::from(on))
}

pub fn words(request: u32, words: &[u64]) -> Message {
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Message::new(request, &body)
}

/// SET_VRING_ADDR with the areas of vring `index` at `base` in the front-end's address space.
pub fn addr_at(index: u32, base: u64) -> Message {
    let words = [u64::from(index), base, base + 0xe000, base + 0xc000, 0];
    self::words(SET_VRING_ADDR, &words)
}

pub fn addr(index: u32) -> Message {
    addr_at(index, UVA + u64::from(index) * STRIDE)
}

/// SET_VRING_KICK, CALL or ERR.
pub fn vring_fd(request: u32, index: u32, fd: Option<&impl AsRawFd>) -> Message {
    match fd {
        Some(fd) => u64_message(request, u64::from(index)).with(fd),
        None => u64_message(request, u64::from(index) | 0x100),
    }
}

/// A memory region as it goes over the wire; its file beside it.
#[derive(Clone, Copy)]
pub struct Region<'a> {
    pub gpa: u64,
    pub size: u64,
    pub offset: u64,
    pub file: &'a std::fs::File,
}

impl Region<'_> {
    fn words(&self) -> [u64; 4] {
        [self.gpa, self.size, UVA.wrapping_add(self.gpa), self.offset]
    }

    pub fn add(&self) -> Message {
        let words = [&[0][..], &self.words()].concat();
        self::words(ADD_MEM_REG, &words).with(self.file)
    }

    pub fn remove(&self) -> Message {
        words(REM_MEM_REG, &[&[0][..], &self.words()].concat())
    }
}

pub fn mem_table(regions: &[Region<'_>]) -> Message {
    let mut words = vec![regions.len() as u64];
    words.extend(regions.iter().flat_map(Region::words));
    let message = self::words(SET_MEM_TABLE, &words);
    regions
        .iter()
        .fold(message, |message, region| message.with(region.file))
}

/// GET_CONFIG or SET_CONFIG.
pub fn config(request: u32, offset: u32, bytes: &[u8]) -> Message {
    let size = u32::try_from(bytes.len()).unwrap();
    let head = [offset, size, 0].map(u32::to_ne_bytes).concat();
    Message::new(request, &[head.as_slice(), bytes].concat())
}
