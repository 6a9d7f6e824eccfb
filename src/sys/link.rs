//! `LinkWatch`: whether there is a link behind a port, and a descriptor that becomes readable when
//! that changes.
//!
//! The link of an interface is told by rtnetlink(7): it is there while the interface is up and has
//! a carrier (IFF_UP and IFF_RUNNING). That of a wire is the other port's front-end, whose thread
//! tells a [`Presence`]. All of this is cold: a session's thread waits for it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ifreq::{InterfaceSocket, check};
use super::netns::{self, NetnsError};
use super::socket::{is_readable_within, size_of_u32, wait_readable};

/// What an interface with a link has.
const LINK: libc::c_uint = (libc::IFF_UP | libc::IFF_RUNNING).cast_unsigned();
/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `ifinfomsg`.
const INTERFACE: usize = 16;
/// More than the kernel puts into one answer; what is cut off is attributes, which we don't read.
const BUFFER: usize = 32768;

/// Why a link can't be watched.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no such interface.
    #[error("interface `{0}`: there is none")]
    Missing(String),
    /// Its namespace can't be entered.
    #[error("interface `{interface}`: {source}")]
    Netns {
        /// The interface.
        interface: String,
        /// What is wrong.
        source: NetnsError,
    },
    /// A system call failed.
    #[error("interface `{interface}`: its link can't be watched: {source}")]
    System {
        /// The interface.
        interface: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What was seen of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// It is there now.
    pub up: bool,
    /// It was not there at some time since it was last looked at, or is not now.
    pub was_down: bool,
}

/// A link that is watched.
#[derive(Debug)]
pub struct LinkWatch(Kind);

#[derive(Debug)]
enum Kind {
    Interface(InterfaceWatch),
    Peer { peer: Arc<Presence>, left: u64 },
}

impl LinkWatch {
    /// Watches the interface `name` in the namespace `netns`, or in that of this thread.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn interface(name: &str, netns: Option<&str>) -> Result<LinkWatch, LinkError> {
        let interface = || name.to_owned();
        let opened = match netns {
            None => InterfaceWatch::open(name),
            Some(netns) => {
                netns::within(netns, || InterfaceWatch::open(name)).map_err(|source| {
                    LinkError::Netns {
                        interface: interface(),
                        source,
                    }
                })?
            }
        };
        match opened {
            Ok(Some(watch)) => Ok(LinkWatch(Kind::Interface(watch))),
            Ok(None) => Err(LinkError::Missing(interface())),
            Err(source) => Err(LinkError::System {
                interface: interface(),
                source,
            }),
        }
    }

    /// Watches the front-end of another port.
    pub fn peer(peer: Arc<Presence>) -> LinkWatch {
        let left = peer.left();
        LinkWatch(Kind::Peer { peer, left })
    }

    /// What has become of the link since the last time. The descriptor is not readable after that,
    /// until there is more.
    ///
    /// # Errors
    /// The system's error; the link can't be watched any more then.
    pub fn read(&mut self) -> io::Result<Seen> {
        match &mut self.0 {
            Kind::Interface(watch) => watch.read(),
            Kind::Peer { peer, left } => {
                match peer.changed.read() {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ => {}
                }
                let now = peer.word.load(Ordering::Acquire);
                let up = now & 1 != 0;
                let was_down = !up || now >> 1 != *left;
                *left = now >> 1;
                Ok(Seen { up, was_down })
            }
        }
    }
}

/// To wait for changes with.
impl AsRawFd for LinkWatch {
    fn as_raw_fd(&self) -> RawFd {
        match &self.0 {
            Kind::Interface(watch) => watch.netlink.as_raw_fd(),
            Kind::Peer { peer, .. } => peer.changed.as_raw_fd(),
        }
    }
}

/// Whether a port has a front-end, told by its own thread to the one that watches.
#[derive(Debug)]
pub struct Presence {
    /// Bit 0: it has one now; above it, how many have left.
    word: AtomicU64,
    changed: EventFd,
}

impl Presence {
    /// That of a port without a front-end.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Presence> {
        Ok(Presence {
            word: AtomicU64::new(0),
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn left(&self) -> u64 {
        self.word.load(Ordering::Acquire) >> 1
    }

    /// A front-end has come, or the one that was there has left. One thread alone tells.
    ///
    /// # Errors
    /// What write(2) says.
    pub fn tell(&self, there: bool) -> io::Result<()> {
        let left = self.left() + u64::from(!there);
        self.word
            .store(left << 1 | u64::from(there), Ordering::Release);
        self.changed.write(1)
    }
}

/// What interrupts the waits of a session's thread: the exit of the daemon, or news of the link.
#[derive(Debug)]
pub struct Wake {
    exit: EventFd,
    /// Over both, when there is a link (or something else) to be watched.
    both: Option<Epoll>,
}

impl Wake {
    /// Readable when `exit` is, or `link`.
    ///
    /// # Errors
    /// What epoll(7) says.
    pub fn new(exit: EventFd, link: Option<&LinkWatch>) -> io::Result<Wake> {
        let Some(link) = link else {
            return Ok(Wake { exit, both: None });
        };
        let epoll = Epoll::new()?;
        for fd in [exit.as_raw_fd(), link.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Wake {
            exit,
            both: Some(epoll),
        })
    }

    /// Readable when `fd` is, too.
    ///
    /// # Errors
    /// What epoll(7) says.
    pub fn also(&mut self, fd: RawFd) -> io::Result<()> {
        let event = || EpollEvent::new(EventSet::IN, 0);
        let both = match self.both.take() {
            Some(both) => both,
            None => {
                let both = Epoll::new()?;
                both.ctl(ControlOperation::Add, self.exit.as_raw_fd(), event())?;
                both
            }
        };
        both.ctl(ControlOperation::Add, fd, event())?;
        self.both = Some(both);
        Ok(())
    }

    /// Whether it is the exit.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn exits(&self) -> io::Result<bool> {
        is_readable_within(&self.exit, Duration::ZERO)
    }

    /// From now on it is the exit alone.
    pub fn forget(&self, link: &LinkWatch) {
        if let Some(both) = &self.both {
            let none = EpollEvent::default();
            // It can only fail when it is not there any more.
            let _ = both.ctl(ControlOperation::Delete, link.as_raw_fd(), none);
        }
    }

    /// Waits for news.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait(&self) -> io::Result<()> {
        wait_readable(self, &self.exit).map(drop)
    }

    /// Waits for news, but not longer than `time`.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait_within(&self, time: Duration) -> io::Result<()> {
        is_readable_within(self, time).map(drop)
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        match &self.both {
            Some(both) => both.as_raw_fd(),
            None => self.exit.as_raw_fd(),
        }
    }
}

/// An interface and the socket that tells of it. Both sockets are of the interface's namespace.
struct InterfaceWatch {
    name: String,
    index: libc::c_int,
    netlink: OwnedFd,
    socket: InterfaceSocket,
    up: bool,
    buffer: Vec<u8>,
}

impl core::fmt::Debug for InterfaceWatch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("InterfaceWatch")
            .field("name", &self.name)
            .field("up", &self.up)
            .finish_non_exhaustive()
    }
}

impl InterfaceWatch {
    /// `None` without such an interface.
    fn open(name: &str) -> io::Result<Option<InterfaceWatch>> {
        let netlink = subscribe()?;
        let socket = InterfaceSocket::new()?;
        let Some(index) = socket.index(name)? else {
            return Ok(None);
        };
        let up = socket.has_link(name)?;
        Ok(Some(InterfaceWatch {
            name: name.to_owned(),
            index,
            netlink,
            socket,
            up,
            buffer: vec![0; BUFFER],
        }))
    }

    fn read(&mut self) -> io::Result<Seen> {
        let mut was_down = !self.up;
        loop {
            match receive(&self.netlink, &mut self.buffer) {
                Ok(bytes) => {
                    for up in news(&self.buffer[..bytes], self.index) {
                        self.up = up;
                        was_down |= !up;
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => break,
                    Some(libc::EINTR) => {}
                    // There was more than the socket holds: we look for ourselves.
                    Some(libc::ENOBUFS) => self.up = self.is_up(),
                    _ => return Err(error),
                },
            }
        }
        was_down |= !self.up;
        Ok(Seen {
            up: self.up,
            was_down,
        })
    }

    /// An interface that was removed has no link, and one of the same name is another.
    fn is_up(&self) -> bool {
        matches!(self.socket.index(&self.name), Ok(Some(index)) if index == self.index)
            && self.socket.has_link(&self.name).unwrap_or(false)
    }
}

/// A socket that tells of every change of an interface.
fn subscribe() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    check(fd)?;
    // SAFETY: `fd` is open and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain integers; all zero is valid.
    let mut address: libc::sockaddr_nl = unsafe { core::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK.try_into().map_err(io::Error::other)?;
    address.nl_groups = libc::RTMGRP_LINK.cast_unsigned();
    let bytes = size_of_u32::<libc::sockaddr_nl>();
    // SAFETY: `address` is initialised and has the size that is given.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) })?;
    Ok(socket)
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` is writable for its length.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// What `messages` say of the link of interface `index`, one after the other.
fn news(mut messages: &[u8], index: libc::c_int) -> Vec<bool> {
    let word = |bytes: &[u8], at: usize| {
        let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
        u32::from_ne_bytes(four.unwrap_or_default())
    };
    let mut links = Vec::new();
    while messages.len() >= HEADER + INTERFACE {
        let length = word(messages, 0) as usize;
        let kind = u16::from_ne_bytes([messages[4], messages[5]]);
        let body = &messages[HEADER..];
        let (of, flags) = (word(body, 4), word(body, 8));
        if of == index.cast_unsigned() {
            if kind == libc::RTM_NEWLINK {
                links.push(flags & LINK == LINK);
            } else if kind == libc::RTM_DELLINK {
                links.push(false);
            }
        }
        // The next one begins at a multiple of four bytes.
        let next = length.next_multiple_of(4).max(HEADER);
        messages = messages.get(next..).unwrap_or_default();
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testnet::{in_private_netns, ip};

    #[test]
    fn an_interface_has_a_link_while_it_is_up_and_its_peer_is() {
        in_private_netns(|| {
            ip("link add v0 type veth peer name v1");
            let mut watch = LinkWatch::interface("v0", None).unwrap();
            let exit = EventFd::new(EFD_NONBLOCK).unwrap();
            let wake = Wake::new(exit.try_clone().unwrap(), Some(&watch)).unwrap();
            let mut after = |command: &str, up: bool| {
                ip(command);
                loop {
                    let seen = watch.read().unwrap();
                    if seen.up == up {
                        return seen.was_down;
                    }
                    wake.wait().unwrap();
                }
            };
            assert!(after("link set v1 up", false));
            assert!(after("link set v0 up", true));
            // Others, and what is no change of the link, don't count.
            assert!(!after("link set lo up", true));
            assert!(!after("link set v0 mtu 1400", true));
            assert!(after("link set v1 down", false), "no carrier");
            assert!(after("link set v1 up", true));
            assert!(after("link set v0 down", false));
            assert!(after("link set v0 up", true));
            // Down and up before we look: it is not missed.
            ip("link set v0 down");
            assert!(after("link set v0 up", true));
            assert!(!wake.exits().unwrap());
            assert!(after("link del v0", false));
            exit.write(1).unwrap();
            assert!(wake.exits().unwrap());
            assert!(matches!(
                LinkWatch::interface("v0", None),
                Err(LinkError::Missing(name)) if name == "v0"
            ));
        });
    }

    #[test]
    fn messages_of_any_bytes_are_read_to_their_end() {
        let mut message = vec![0u8; HEADER + INTERFACE];
        let length = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
        message[HEADER + 4..HEADER + 8].copy_from_slice(&7u32.to_ne_bytes());
        message[HEADER + 8..HEADER + 12].copy_from_slice(&LINK.to_ne_bytes());
        let two = [message.clone(), message.clone()].concat();
        assert_eq!(news(&two, 7), [true, true]);
        assert!(news(&two, 8).is_empty());
        assert_eq!(news(&two[..HEADER + INTERFACE + 3], 7), [true]);
        for length in [0u32, 1, 15, 17, u32::MAX] {
            message[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(news(&message, 7), [true]);
        }
        assert!(news(&[0xff; 100], 7).is_empty());
    }

    #[test]
    fn a_front_end_that_left_and_came_again_was_gone() {
        let presence = Arc::new(Presence::new().unwrap());
        let mut watch = LinkWatch::peer(Arc::clone(&presence));
        let mut read = || watch.read().unwrap();
        let seen = |up, was_down| Seen { up, was_down };
        assert_eq!(read(), seen(false, true));
        presence.tell(true).unwrap();
        assert_eq!(read(), seen(true, false));
        presence.tell(false).unwrap();
        presence.tell(true).unwrap();
        assert_eq!(read(), seen(true, true));
        assert_eq!(read(), seen(true, false));
        presence.tell(false).unwrap();
        assert_eq!(read(), seen(false, true));
    }
}
