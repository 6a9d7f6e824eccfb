//! The front-end's side of vhost-user, as far as a load generator needs it.
//!
//! Written out here because the front-end of the `vhost` crate sends a vring base of 16 bits, and a
//! packed ring has 32, and because it waits for answers without end. Nothing here waits longer than
//! [`ANSWER_WITHIN`]. vhost-user: "Message Specification".

use std::io::{ErrorKind, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::BenchError;
use crate::sys::share;

/// How long a back-end may take over one message; mapping much memory takes a while.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// VHOST_USER_F_PROTOCOL_FEATURES, a bit of the device features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_MQ.
pub(super) const PROTOCOL_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_CONFIG.
pub(super) const PROTOCOL_CONFIG: u64 = 1 << 9;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// A request: its number and its name.
type Request = (u32, &'static str);

const GET_FEATURES: Request = (1, "GET_FEATURES");
const SET_FEATURES: Request = (2, "SET_FEATURES");
const SET_OWNER: Request = (3, "SET_OWNER");
const SET_MEM_TABLE: Request = (5, "SET_MEM_TABLE");
const SET_VRING_NUM: Request = (8, "SET_VRING_NUM");
const SET_VRING_ADDR: Request = (9, "SET_VRING_ADDR");
const SET_VRING_BASE: Request = (10, "SET_VRING_BASE");
const SET_VRING_KICK: Request = (12, "SET_VRING_KICK");
const SET_VRING_CALL: Request = (13, "SET_VRING_CALL");
const GET_PROTOCOL_FEATURES: Request = (15, "GET_PROTOCOL_FEATURES");
const SET_PROTOCOL_FEATURES: Request = (16, "SET_PROTOCOL_FEATURES");
const GET_QUEUE_NUM: Request = (17, "GET_QUEUE_NUM");
const SET_VRING_ENABLE: Request = (18, "SET_VRING_ENABLE");
const GET_CONFIG: Request = (24, "GET_CONFIG");

/// Offset, size and flags, before the bytes of config space.
const CONFIG_HEAD_BYTES: usize = 12;

/// A vring as it is described to a back-end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vring {
    /// Number of the vring.
    pub index: u32,
    /// Descriptors.
    pub size: u16,
    /// SET_VRING_BASE's value.
    pub base: u32,
    /// Front-end addresses of descriptor, driver and device area.
    pub at: [u64; 3],
    /// Eventfd for kicks.
    pub kick: RawFd,
    /// Eventfd for calls.
    pub call: RawFd,
}

/// A connection to a back-end.
#[derive(Debug)]
pub(super) struct Client {
    socket: UnixStream,
    acks: bool,
    /// Device features offered.
    features: u64,
    /// Protocol features offered.
    protocol: u64,
}

impl Client {
    /// Connects, takes the device and reads what it offers.
    ///
    /// # Errors
    /// When nobody listens, or no answer comes.
    pub(super) fn connect(path: &Path) -> Result<Client, BenchError> {
        let connect = || {
            let socket = share::connect(path)?;
            socket.set_read_timeout(Some(ANSWER_WITHIN))?;
            socket.set_write_timeout(Some(ANSWER_WITHIN))?;
            Ok(socket)
        };
        let socket = connect().map_err(|source| BenchError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let mut client = Client {
            socket,
            acks: false,
            features: 0,
            protocol: 0,
        };
        client.send(SET_OWNER, &[], &[])?;
        client.features = client.get(GET_FEATURES)?;
        if client.features & PROTOCOL_FEATURES != 0 {
            client.protocol = client.get(GET_PROTOCOL_FEATURES)?;
        }
        Ok(client)
    }

    /// Device features offered.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Protocol features offered.
    pub(super) fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Acknowledges the device features `wanted`, and those of `protocol` that are offered.
    ///
    /// # Errors
    /// When the back-end refuses them.
    pub(super) fn negotiate(&mut self, wanted: u64, protocol: u64) -> Result<(), BenchError> {
        let protocol = self.protocol & (PROTOCOL_REPLY_ACK | protocol);
        if self.features & PROTOCOL_FEATURES != 0 {
            self.send(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
            self.acks = protocol & PROTOCOL_REPLY_ACK != 0;
        }
        let features = wanted | (self.features & PROTOCOL_FEATURES);
        self.set(SET_FEATURES, &features.to_ne_bytes(), &[])
    }

    /// How many queues the back-end has; network back-ends count pairs.
    ///
    /// # Errors
    /// When no answer comes.
    pub(super) fn queue_num(&mut self) -> Result<u64, BenchError> {
        self.get(GET_QUEUE_NUM)
    }

    /// The first `N` bytes of the device's config space.
    ///
    /// # Errors
    /// When no answer comes, or another one.
    pub(super) fn config<const N: usize>(&mut self) -> Result<[u8; N], BenchError> {
        let mut body = Vec::with_capacity(CONFIG_HEAD_BYTES + N);
        for word in [0, u32::try_from(N).unwrap_or(u32::MAX), 0] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        body.extend_from_slice(&[0; N]);
        self.send(GET_CONFIG, &body, &[])?;
        let mut reply = vec![0; body.len()];
        self.receive_into(GET_CONFIG, &mut reply)?;
        let mut config = [0; N];
        config.copy_from_slice(&reply[CONFIG_HEAD_BYTES..]);
        Ok(config)
    }

    /// Shares one region of memory: guest physical address, size, front-end address.
    ///
    /// # Errors
    /// When the back-end refuses it.
    pub(super) fn share(&mut self, region: [u64; 3], memory: RawFd) -> Result<(), BenchError> {
        let mut body = Vec::new();
        // The number of regions, and padding.
        body.extend_from_slice(&1u64.to_ne_bytes());
        for word in region.into_iter().chain([0]) {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        self.set(SET_MEM_TABLE, &body, &[memory])
    }

    /// Describes a vring and starts it.
    ///
    /// # Errors
    /// When the back-end refuses it.
    pub(super) fn start(&mut self, vring: &Vring) -> Result<(), BenchError> {
        let Vring { index, at, .. } = *vring;
        self.set(SET_VRING_NUM, &pair(index, u32::from(vring.size)), &[])?;
        self.set(SET_VRING_BASE, &pair(index, vring.base), &[])?;
        let [desc, driver, device] = at;
        let mut body = pair(index, 0).to_vec();
        // The wire has the used ring before the available one; there is no log.
        for address in [desc, device, driver, 0] {
            body.extend_from_slice(&address.to_ne_bytes());
        }
        self.set(SET_VRING_ADDR, &body, &[])?;
        let index = u64::from(index).to_ne_bytes();
        self.set(SET_VRING_CALL, &index, &[vring.call])?;
        self.set(SET_VRING_KICK, &index, &[vring.kick])
    }

    /// Enables a vring; without protocol features it is enabled from the start.
    ///
    /// # Errors
    /// When the back-end refuses it.
    pub(super) fn enable(&mut self, index: u32) -> Result<(), BenchError> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        self.set(SET_VRING_ENABLE, &pair(index, 1), &[])
    }

    /// There is nothing more to say: from here on nothing waits for the socket.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn fall_silent(&mut self) -> Result<(), BenchError> {
        let silent = self.socket.set_nonblocking(true);
        silent.map_err(|source| BenchError::talk("fcntl", source))
    }

    /// Whether the back-end has closed the connection, after [`Client::fall_silent`].
    pub(super) fn is_closed(&self) -> bool {
        let mut byte = [0];
        match (&self.socket).read(&mut byte) {
            Ok(bytes) => bytes == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// A request without a reply of its own: with REPLY_ACK its success is waited for.
    fn set(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), BenchError> {
        self.send(request, body, fds)?;
        if !self.acks {
            return Ok(());
        }
        match self.receive(request)? {
            0 => Ok(()),
            _ => Err(BenchError::Refused { request: request.1 }),
        }
    }

    fn get(&mut self, request: Request) -> Result<u64, BenchError> {
        self.send(request, &[], &[])?;
        self.receive(request)
    }

    fn send(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), BenchError> {
        let flags = VERSION | if self.acks { NEED_REPLY } else { 0 };
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(12 + body.len());
        for word in [request.0, flags, size] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(body);
        let sent = self.socket.send_with_fds(&[&message[..]], fds);
        let sent = sent.map_err(std::io::Error::from);
        match sent {
            Ok(bytes) if bytes == message.len() => Ok(()),
            Ok(_) => Err(BenchError::talk(request.1, ErrorKind::WriteZero.into())),
            Err(source) => Err(BenchError::talk(request.1, source)),
        }
    }

    /// A reply of one word.
    fn receive(&mut self, request: Request) -> Result<u64, BenchError> {
        let mut value = [0; 8];
        self.receive_into(request, &mut value)?;
        Ok(u64::from_ne_bytes(value))
    }

    /// A reply as long as `body`.
    fn receive_into(&mut self, request: Request, body: &mut [u8]) -> Result<(), BenchError> {
        let failed = |source| BenchError::talk(request.1, source);
        let mut head = [0; 12];
        (&self.socket).read_exact(&mut head).map_err(failed)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&head[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        if word(0) != request.0 || word(4) & REPLY == 0 || word(8) as usize != body.len() {
            return Err(BenchError::Nonsense { request: request.1 });
        }
        (&self.socket).read_exact(body).map_err(failed)
    }
}

/// The bits of all features that a flag asks for: flag, number, name.
///
/// # Errors
/// For the first that is not among the `offered`.
pub(super) fn require(
    offered: u64,
    wanted: impl IntoIterator<Item = (Option<String>, u32, &'static str)>,
) -> Result<u64, BenchError> {
    let mut mask = 0;
    for (flag, bit, name) in wanted {
        let Some(flag) = flag else { continue };
        if offered & (1 << bit) == 0 {
            return Err(BenchError::Feature { flag, name, bit });
        }
        mask |= 1 << bit;
    }
    Ok(mask)
}

fn pair(index: u32, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&index.to_ne_bytes());
    body[4..].copy_from_slice(&value.to_ne_bytes());
    body
}
