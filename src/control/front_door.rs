//! The front door: sees every message before the `vhost` crate's parser does.
//!
//! The crate refuses messages that real front-ends send: QEMU 10 sends SET_VRING_ENABLE for
//! virtio-net before its first SET_FEATURES, which the crate treats as fatal, and it has no
//! SET_STATUS and GET_STATUS at all. Those are served here. Everything else goes to the parser, but
//! only when it has arrived whole, because the parser reads a body with one call. Messages that
//! nobody serves are refused here by name, so that the session goes on (docs/decisions/0001).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, MutexGuard};

use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::engine::BlockingFd;
use crate::memory::RegionInfo;
use crate::sys::peer::{self, Arrivals, Ready};

use super::handler::{Answer, DeviceSession, Refused, proto};
use super::state::PROTOCOL_FEATURES_BIT;

/// Size of the header: request, flags, size of the body.
const HEADER: usize = 12;
/// Largest body that the protocol knows of.
const BODY_MAX: usize = 4096;
/// Protocol version 1, and with the reply bit.
const VERSION: u32 = 0x1;
const REPLY: u32 = 0x5;
const NEED_REPLY: u32 = 0x8;

/// Request codes that are served or told apart here (vhost-user: "Front-end message types").
mod code {
    pub(super) const GET_FEATURES: u32 = 1;
    pub(super) const SET_LOG_FD: u32 = 7;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(super) const GET_QUEUE_NUM: u32 = 17;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const SEND_RARP: u32 = 19;
    pub(super) const NET_SET_MTU: u32 = 20;
    pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(super) const IOTLB_MSG: u32 = 22;
    pub(super) const SET_VRING_ENDIAN: u32 = 23;
    pub(super) const GET_CONFIG: u32 = 24;
    pub(super) const CREATE_CRYPTO_SESSION: u32 = 26;
    pub(super) const CLOSE_CRYPTO_SESSION: u32 = 27;
    pub(super) const GET_INFLIGHT_FD: u32 = 31;
    pub(super) const VRING_KICK: u32 = 35;
    pub(super) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(super) const SET_STATUS: u32 = 39;
    pub(super) const GET_STATUS: u32 = 40;
    pub(super) const GET_SHARED_OBJECT: u32 = 41;
    pub(super) const GET_SHMEM_CONFIG: u32 = 44;

    /// Requests that the front-end waits for: an error can only be told by closing.
    pub(super) const GETS: [u32; 10] = [
        GET_FEATURES,
        GET_VRING_BASE,
        GET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        GET_CONFIG,
        GET_INFLIGHT_FD,
        GET_MAX_MEM_SLOTS,
        GET_STATUS,
        GET_SHARED_OBJECT,
        GET_SHMEM_CONFIG,
    ];
}

/// The crate wants a shared handler; only the session's own thread ever locks it.
#[expect(
    clippy::disallowed_types,
    reason = "the vhost crate's interface; cold, never contended"
)]
pub(super) type Shared = std::sync::Mutex<DeviceSession>;

/// Locks the handler: never contended, and a panic would have ended the process.
pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, DeviceSession> {
    shared
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front-end closed its socket.
    #[error("front-end closed the connection")]
    Closed,
    /// The daemon is shutting down.
    #[error("daemon is shutting down")]
    Exit,
    /// The port has no link.
    #[error("link is down")]
    LinkDown,
    /// The front-end's memory is not there any more.
    #[error(
        "the file of the memory region at gpa {:#x} ({:#x} bytes from offset {:#x}) has become \
         shorter, or the host has no page for it",
        .0.gpa, .0.size, .0.mmap_offset
    )]
    Torn(RegionInfo),
    /// A worker slept in an fd of the front-end.
    #[error(transparent)]
    Blocking(BlockingFd),
    /// The front-end broke the protocol, or can't be answered.
    #[error("{request}: {reason}")]
    Protocol {
        /// Which request.
        request: String,
        /// What is wrong.
        reason: String,
    },
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] io::Error),
}

/// A message's header.
#[derive(Debug, Clone, Copy)]
struct Header {
    request: u32,
    flags: u32,
    size: usize,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Header {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Header {
            request: word(0),
            flags: word(4),
            size: word(8) as usize,
        }
    }

    fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// One connection's messages.
pub(super) struct FrontDoor {
    socket: UnixStream,
    arrivals: Arrivals,
    parser: BackendReqHandler<Shared>,
    session: Arc<Shared>,
}

impl FrontDoor {
    /// A new connection on `socket`.
    pub(super) fn new(socket: UnixStream, session: Arc<Shared>) -> io::Result<FrontDoor> {
        let parser = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        lock(&session).connected(socket.try_clone()?.into());
        Ok(FrontDoor {
            arrivals: Arrivals::new(&socket)?,
            socket,
            parser,
            session,
        })
    }

    /// A connection in the middle of a session that another process (or handler) began: tells a
    /// fresh parser what was negotiated, over a socket pair, and puts the real socket in its place.
    pub(super) fn resume(socket: UnixStream, session: Arc<Shared>) -> io::Result<FrontDoor> {
        let (ours, theirs) = UnixStream::pair()?;
        let (features, protocol) = {
            let session = lock(&session);
            (session.state.features, session.state.protocol_features)
        };
        let mut parser = BackendReqHandler::from_stream(theirs, Arc::clone(&session));
        let mut feed = |request: u32, body: Option<u64>| -> io::Result<()> {
            let body = body.map(u64::to_ne_bytes);
            let size = body.map_or(0, |body| body.len());
            write_message(
                &ours,
                request,
                1,
                body.as_ref().map_or(&[], |b| b.as_slice()),
            )?;
            parser.handle_request().map_err(io::Error::other)?;
            if size == 0 {
                // A reply of header and u64, which nobody else will read.
                (&ours).read_exact(&mut [0; HEADER + 8])?;
            }
            Ok(())
        };
        feed(code::GET_FEATURES, None)?;
        if let Some(features) = features {
            feed(2, Some(features))?;
        }
        feed(code::GET_PROTOCOL_FEATURES, None)?;
        feed(16, Some(protocol))?;
        peer::replace(&parser, &socket)?;
        lock(&session).connected(socket.try_clone()?.into());
        Ok(FrontDoor {
            arrivals: Arrivals::new(&socket)?,
            socket,
            parser,
            session,
        })
    }

    /// Serves messages until the session ends.
    pub(super) fn serve(&mut self, exit: &impl AsRawFd) -> SessionEnd {
        loop {
            match self.step(exit) {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Serves one message.
    pub(super) fn step(&mut self, exit: &impl AsRawFd) -> Result<(), SessionEnd> {
        let header = self.next_header(exit)?;
        // A front-end that never reads must not hold this thread in a write, nor one that never
        // pauses keep it from its exit.
        if peer::wait_writable(&self.socket, exit)? == Ready::Exit {
            return Err(SessionEnd::Exit);
        }
        let parser_takes_enable = lock(&self.session).parsed.features & PROTOCOL_FEATURES_BIT != 0;
        match header.request {
            code::SET_STATUS | code::GET_STATUS => self.serve_here(header)?,
            code::SET_VRING_ENABLE if !parser_takes_enable => self.serve_here(header)?,
            code::SET_BACKEND_REQ_FD
            | code::SET_LOG_FD
            | code::SEND_RARP
            | code::NET_SET_MTU
            | code::IOTLB_MSG
            | code::SET_VRING_ENDIAN
            | code::CREATE_CRYPTO_SESSION
            | code::CLOSE_CRYPTO_SESSION
            | code::VRING_KICK => self.serve_here(header)?,
            _ => self.parse(header)?,
        }
        match lock(&self.session).stop_failed.take() {
            Some(reason) => Err(protocol_error(header, &reason)),
            None => Ok(()),
        }
    }

    /// Waits for a whole message and looks at its header.
    fn next_header(&mut self, exit: &impl AsRawFd) -> Result<Header, SessionEnd> {
        let mut bytes = [0; HEADER];
        self.wait_for(HEADER, exit)?;
        peer::peek(&self.socket, &mut bytes)?;
        let header = Header::parse(&bytes);
        if header.flags & !NEED_REPLY != VERSION {
            let reason = format!("flags {:#x} are no request of version 1", header.flags);
            return Err(protocol_error(header, &reason));
        }
        if header.size > BODY_MAX {
            let reason = format!("a body of {} bytes", header.size);
            return Err(protocol_error(header, &reason));
        }
        self.wait_for(HEADER + header.size, exit)?;
        Ok(header)
    }

    /// Waits until `bytes` bytes are there.
    fn wait_for(&self, bytes: usize, exit: &impl AsRawFd) -> Result<(), SessionEnd> {
        loop {
            // In this order: what came before the end is counted.
            let closed = peer::hung_up(&self.socket)?;
            let there = peer::waiting(&self.socket)?;
            if there >= bytes {
                return Ok(());
            }
            if closed && there == 0 {
                return Err(SessionEnd::Closed);
            }
            if closed {
                return Err(SessionEnd::Protocol {
                    request: "message".into(),
                    reason: format!("connection closed after {there} bytes of a message"),
                });
            }
            if self.arrivals.wait(exit)? == Ready::Exit {
                return Err(SessionEnd::Exit);
            }
        }
    }

    /// Lets the parser read and serve the message.
    fn parse(&mut self, header: Header) -> Result<(), SessionEnd> {
        lock(&self.session).called = false;
        let result = self.parser.handle_request();
        let called = lock(&self.session).called;
        let Err(error) = result else { return Ok(()) };
        match error {
            VhostError::Disconnected => Err(SessionEnd::Closed),
            VhostError::ReqHandlerError(_)
            | VhostError::InvalidParam
            | VhostError::InvalidOperation(_)
            | VhostError::InactiveFeature(_)
            | VhostError::InactiveOperation(_)
                if !code::GETS.contains(&header.request) =>
            {
                self.refused(header, &text(&error));
                // The parser has answered for what it passed on to us, and for nothing else.
                if !called && header.needs_reply() && self.acks() {
                    self.reply(header.request, 1)?;
                }
                Ok(())
            }
            VhostError::InvalidMessage => {
                let reason = format!("its {} bytes or its descriptors are invalid", header.size);
                Err(protocol_error(header, &reason))
            }
            error => Err(protocol_error(header, &text(&error))),
        }
    }

    /// Reads the message and serves it without the parser.
    fn serve_here(&mut self, header: Header) -> Result<(), SessionEnd> {
        let mut message = vec![0; HEADER + header.size];
        // It has arrived whole.
        let (got, file) = peer::receive(&self.socket, &mut message)?;
        self.socket.read_exact(&mut message[got..])?;
        let body = &message[HEADER..];
        let answer = self.answer(header, body, file.map(File::from));
        match answer {
            Ok(Some(value)) => self.reply(header.request, value)?,
            Ok(None) if header.needs_reply() && self.acks() => self.reply(header.request, 0)?,
            Ok(None) => {}
            Err(refused) if header.request == code::GET_STATUS => {
                return Err(protocol_error(header, &refused.0));
            }
            Err(refused) => {
                self.refused(header, &refused.0);
                if header.needs_reply() && self.acks() {
                    self.reply(header.request, 1)?;
                }
            }
        }
        Ok(())
    }

    /// What the message does; `Some` is a value to reply with.
    fn answer(&self, header: Header, body: &[u8], file: Option<File>) -> Answer<Option<u64>> {
        let mut session = lock(&self.session);
        let has_status = session.state.protocol_features & proto::STATUS != 0;
        match header.request {
            code::SET_STATUS if has_status => {
                let status = u64_of(body)?;
                let byte = u8::try_from(status)
                    .map_err(|_| Refused(format!("{status:#x} is no device status")))?;
                session.set_status(byte).map(|()| None)
            }
            code::SET_BACKEND_REQ_FD => session.set_channel(file).map(|()| None),
            code::GET_STATUS if has_status => Ok(Some(u64::from(session.state.status))),
            code::SET_VRING_ENABLE => {
                let (index, num) = vring_state_of(body)?;
                if num > 1 {
                    return Err(Refused(format!("{num} is neither 0 nor 1")));
                }
                session.set_vring_enable(index, num == 1).map(|()| None)
            }
            _ => Err(Refused("its feature was not negotiated".into())),
        }
    }

    fn acks(&self) -> bool {
        lock(&self.session).parsed.protocol_features & proto::REPLY_ACK != 0
    }

    fn reply(&self, request: u32, value: u64) -> io::Result<()> {
        write_message(&self.socket, request, REPLY, &value.to_ne_bytes())
    }

    fn refused(&self, header: Header, reason: &str) {
        let session = lock(&self.session);
        tracing::warn!(
            "{} {}: refused {}: {reason}",
            session.kind(),
            session.device.name(),
            name_of(header.request)
        );
    }
}

fn write_message(mut to: &UnixStream, request: u32, flags: u32, body: &[u8]) -> io::Result<()> {
    let size = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(HEADER + body.len());
    for word in [request, flags, size] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(body);
    to.write_all(&message)
}

fn u64_of(body: &[u8]) -> Answer<u64> {
    let bytes = body
        .try_into()
        .map_err(|_| Refused(format!("a body of {} bytes", body.len())))?;
    Ok(u64::from_ne_bytes(bytes))
}

fn vring_state_of(body: &[u8]) -> Answer<(u32, u32)> {
    let both = u64_of(body)?.to_ne_bytes();
    let word = |at: usize| u32::from_ne_bytes([both[at], both[at + 1], both[at + 2], both[at + 3]]);
    Ok((word(0), word(4)))
}

fn text(error: &VhostError) -> String {
    match error {
        VhostError::ReqHandlerError(inner) => inner.to_string(),
        other => other.to_string(),
    }
}

fn protocol_error(header: Header, reason: &str) -> SessionEnd {
    SessionEnd::Protocol {
        request: name_of(header.request),
        reason: reason.to_owned(),
    }
}

/// The request's name in the protocol's text.
fn name_of(request: u32) -> String {
    const NAMES: [&str; 45] = [
        "",
        "GET_FEATURES",
        "SET_FEATURES",
        "SET_OWNER",
        "RESET_OWNER",
        "SET_MEM_TABLE",
        "SET_LOG_BASE",
        "SET_LOG_FD",
        "SET_VRING_NUM",
        "SET_VRING_ADDR",
        "SET_VRING_BASE",
        "GET_VRING_BASE",
        "SET_VRING_KICK",
        "SET_VRING_CALL",
        "SET_VRING_ERR",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "SET_VRING_ENABLE",
        "SEND_RARP",
        "NET_SET_MTU",
        "SET_BACKEND_REQ_FD",
        "IOTLB_MSG",
        "SET_VRING_ENDIAN",
        "GET_CONFIG",
        "SET_CONFIG",
        "CREATE_CRYPTO_SESSION",
        "CLOSE_CRYPTO_SESSION",
        "POSTCOPY_ADVISE",
        "POSTCOPY_LISTEN",
        "POSTCOPY_END",
        "GET_INFLIGHT_FD",
        "SET_INFLIGHT_FD",
        "GPU_SET_SOCKET",
        "RESET_DEVICE",
        "VRING_KICK",
        "GET_MAX_MEM_SLOTS",
        "ADD_MEM_REG",
        "REM_MEM_REG",
        "SET_STATUS",
        "GET_STATUS",
        "GET_SHARED_OBJECT",
        "SET_DEVICE_STATE_FD",
        "CHECK_DEVICE_STATE",
        "GET_SHMEM_CONFIG",
    ];
    let known = usize::try_from(request)
        .ok()
        .and_then(|at| NAMES.get(at))
        .copied();
    match known {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!("request {request}"),
    }
}
