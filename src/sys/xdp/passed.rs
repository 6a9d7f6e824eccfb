//! A port whose sockets somebody else has opened: the two sides of a process without capabilities.
//!
//! An AF_XDP socket takes CAP_NET_RAW, the program and its map CAP_BPF and CAP_NET_ADMIN. A process
//! that has them makes all that and becomes the daemon, which needs none of them: memory, rings and
//! binding are anybody's, and so is a map that one has a descriptor of (since Linux 5.19).

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::sys::ifreq::{InterfaceSocket, check};
use crate::sys::socket::{close_on_exec, inherit};
use crate::sys::systemd;

use super::bpf::{Mode, XskMap};
use super::{
    Found, Means, TxCsum, Xdp, XdpError, XdpSocket, attached, busy, failed, find, locked, means,
};

/// SO_NETNS_COOKIE, which libc has for few targets.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A descriptor that a process was started with, as the operator tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PassedFd {
    /// By its number.
    Number(RawFd),
    /// By the name that the service manager has told with it (LISTEN_FDNAMES).
    Name(String),
}

/// Descriptors that a process was started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedXdp {
    /// AF_XDP sockets, of the queues from 0 on.
    pub sockets: Vec<PassedFd>,
    /// The XSKMAP of the program at the interface; without one they are in it already.
    pub map: Option<PassedFd>,
}

/// The same by their numbers.
struct Numbers {
    sockets: Vec<RawFd>,
    map: Option<RawFd>,
}

impl Numbers {
    fn all(&self) -> impl Iterator<Item = RawFd> {
        self.sockets.iter().copied().chain(self.map)
    }
}

/// An interface, as the operator names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XdpPlace {
    /// Its name.
    pub interface: String,
    /// What of it somebody else has opened.
    pub passed: Option<PassedXdp>,
    /// Microseconds of busy polling (SO_BUSY_POLL); 0: none.
    pub busy_poll: u32,
    /// Who makes the checksums of what is sent.
    pub tx_csum: TxCsum,
}

impl PassedFd {
    /// The key that it is told with, in front of numbers `key`, in front of names `keyname`.
    fn key(&self) -> &'static str {
        match self {
            PassedFd::Number(_) => "",
            PassedFd::Name(_) => "name",
        }
    }

    fn number(&self, interface: &str) -> Result<RawFd, XdpError> {
        match self {
            PassedFd::Number(number) => Ok(*number),
            PassedFd::Name(fd) => systemd::passed_fd(fd).map_err(|source| XdpError::Named {
                name: interface.into(),
                fd: fd.clone(),
                source,
            }),
        }
    }
}

impl fmt::Display for PassedFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PassedFd::Number(number) => number.fmt(f),
            PassedFd::Name(name) => name.fmt(f),
        }
    }
}

impl PassedXdp {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &PassedFd> {
        self.sockets.iter().chain(&self.map)
    }

    /// Their numbers.
    fn numbers(&self, interface: &str) -> Result<Numbers, XdpError> {
        let number = |fd: &PassedFd| fd.number(interface);
        Ok(Numbers {
            sockets: self.sockets.iter().map(number).collect::<Result<_, _>>()?,
            map: self.map.as_ref().map(number).transpose()?,
        })
    }
}

impl fmt::Display for XdpPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "xdp:{}", self.interface)?;
        if let Some(passed) = &self.passed {
            let key = passed.sockets.first().map_or("", PassedFd::key);
            let fds: Vec<_> = passed.sockets.iter().map(ToString::to_string).collect();
            write!(f, ":fd{key}={}", fds.join("+"))?;
            if let Some(map) = &passed.map {
                write!(f, ":map{}={map}", map.key())?;
            }
        }
        Ok(())
    }
}

impl Xdp {
    /// Opens the interface of `place`, as [`Xdp::open`] does. With sockets that were passed there
    /// are as many queues as those.
    ///
    /// # Errors
    /// [`XdpError`].
    pub fn open_at(place: &XdpPlace, queues: u16, mtu: Option<u16>) -> Result<Xdp, XdpError> {
        let name = place.interface.as_str();
        let Some(passed) = &place.passed else {
            let found = find(name, queues, mtu)?.with_csum(place.tx_csum);
            return Xdp::with_own(&found, place.busy_poll);
        };
        let queues = u16::try_from(passed.sockets.len()).unwrap_or(u16::MAX);
        let found = find(name, queues, mtu)?.with_csum(place.tx_csum);
        let (sockets, means) = take_over(&found, &passed.numbers(name)?)?;
        Xdp::bound(&found, means, sockets, place.busy_poll)
    }
}

/// Takes over what was passed to this process.
fn take_over(found: &Found, passed: &Numbers) -> Result<(Vec<XdpSocket>, Means), XdpError> {
    let error = |fd, reason: &str| XdpError::Passed {
        name: found.name.clone(),
        fd,
        reason: reason.into(),
    };
    let take = |fd| inherit(fd).map_err(|reason| error(fd, &reason));
    let here = InterfaceSocket::new()
        .ok()
        .and_then(|socket| cookie(&socket));
    let mut sockets = Vec::new();
    for &fd in &passed.sockets {
        let socket = take(fd)?;
        if option::<libc::c_int>(&socket, libc::SO_DOMAIN) != Some(libc::AF_XDP) {
            return Err(error(fd, "is not an AF_XDP socket"));
        }
        // Interfaces have numbers, which are those of a namespace.
        if let (Some(here), Some(there)) = (here, cookie(&socket))
            && here != there
        {
            return Err(error(fd, "is a socket of another network namespace"));
        }
        sockets.push(socket);
    }
    let map = passed.map.map(|fd| match XskMap::of(take(fd)?) {
        None => Err(error(fd, "is not an XSKMAP")),
        Some((_, places)) if places < u32::from(found.queues) => {
            let what = format!("is an XSKMAP for {places} queues, fewer than there are sockets");
            Err(error(fd, &what))
        }
        Some((map, _)) => Ok(map),
    });
    let map = map.transpose()?;
    if let (Some(map), Some(fd), Some(first)) = (&map, passed.map, sockets.first()) {
        try_out(map, first).map_err(|source| error(fd, &format!("can't be used: {source}")))?;
    }
    let sockets =
        locked::with_memory(found, sockets).map_err(|(queue, refused)| match refused {
            XdpError::Busy { .. } => error(
                passed.sockets[usize::from(queue)],
                "is in use: an AF_XDP socket must be a new one",
            ),
            other => other,
        })?;
    // Only now is it certain that they are ours.
    for fd in passed.all() {
        close_on_exec(fd).map_err(|source| failed(&found.name, "take it over", source))?;
    }
    let name = &found.name;
    let there = attached::mode(found.index).map_err(|source| failed(name, "look at it", source))?;
    if there.is_none() {
        tracing::warn!("xdp {name}: it has no XDP program: nothing is received until it has one");
    }
    let means = Means {
        map,
        held: None,
        // Where a driver has no place for a program it has none for our memory.
        mode: there.unwrap_or(Mode::Generic),
    };
    Ok((sockets, means))
}

/// Better now than when the first guest comes: older kernels want CAP_BPF for it.
fn try_out(map: &XskMap, socket: &OwnedFd) -> io::Result<()> {
    map.insert(0, socket.as_raw_fd())?;
    map.remove(0)
}

/// Which network namespace a socket is of; `None` before Linux 5.14.
fn cookie(socket: &impl AsRawFd) -> Option<u64> {
    option(socket, SO_NETNS_COOKIE)
}

fn option<T: Copy + Default>(socket: &impl AsRawFd, name: libc::c_int) -> Option<T> {
    let mut value = T::default();
    let mut bytes = libc::socklen_t::try_from(size_of::<T>()).ok()?;
    let (at, len) = ((&raw mut value).cast(), &raw mut bytes);
    // SAFETY: `value` has as many bytes as are told; integers are passed here.
    let answer = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, at, len) };
    (answer == 0).then_some(value)
}

/// Makes all that the ports at `places` take capabilities for, under the numbers that they name,
/// and leaves it to the program that this process will become. A place without numbers gets
/// nothing.
///
/// # Errors
/// [`XdpError`].
pub fn hand_over(places: &[XdpPlace]) -> Result<(), XdpError> {
    let mut all = Vec::new();
    for place in places {
        if let Some(passed) = &place.passed {
            all.push((place, passed.numbers(&place.interface)?));
        }
    }
    let above = all.iter().flat_map(|(_, passed)| passed.all().max());
    let above = above.max().unwrap_or(0).saturating_add(1);
    for (place, passed) in &all {
        if let Some(fd) = passed.all().find(|fd| is_open(*fd)) {
            return Err(XdpError::Passed {
                name: place.interface.clone(),
                fd,
                reason: "is in use already: choose another number".into(),
            });
        }
    }
    for (place, passed) in &all {
        let name = place.interface.as_str();
        let system = |source| failed(name, "hand its descriptors over", source);
        let queues = u16::try_from(passed.sockets.len()).unwrap_or(u16::MAX);
        let found = find(name, queues, None)?;
        let (sockets, means) = means(&found)?;
        for socket in &sockets {
            busy::poll(socket, place.busy_poll)
                .map_err(|source| failed(name, busy::WHAT, source))?;
        }
        // Out of the way of the numbers first.
        let lift = |fd: OwnedFd| duplicate_above(fd, above).map_err(system);
        let sockets: Result<Vec<_>, _> = sockets.into_iter().map(lift).collect();
        let sockets = sockets?;
        let map = means.map.map(XskMap::into_fd).map(lift).transpose()?;
        let held = means
            .held
            .map(|held| [held.link.into_fd(), held.promiscuous]);
        for fd in held.into_iter().flatten() {
            leave_open(lift(fd)?).map_err(system)?;
        }
        for (socket, number) in sockets.iter().zip(&passed.sockets) {
            place_at(socket, *number).map_err(system)?;
        }
        if let Some(map) = &map {
            match passed.map {
                Some(number) => place_at(map, number).map_err(system)?,
                // Who has no map can't put them there.
                None => fill(map, &sockets).map_err(system)?,
            }
        }
    }
    Ok(())
}

fn fill(map: &OwnedFd, sockets: &[OwnedFd]) -> io::Result<()> {
    let Some((map, _)) = XskMap::of(map.try_clone()?) else {
        return Err(io::Error::other("the map is none"));
    };
    let mut both = (0..).zip(sockets);
    both.try_for_each(|(queue, socket)| map.insert(queue, socket.as_raw_fd()))
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: no pointers are passed; a closed descriptor is an error.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// The same under a number that is not less than `least`.
fn duplicate_above(fd: OwnedFd, least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed, and `fd` is open.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    check(copy)?;
    // SAFETY: `copy` is open and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A copy under this number, for the program that this process will become.
fn place_at(fd: &OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; `number` was found to be nobody's.
    check(unsafe { libc::dup3(fd.as_raw_fd(), number, 0) })
}

/// Whatever number it has: it only has to stay open.
fn leave_open(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers are passed, and `fd` is open.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) })?;
    core::mem::forget(fd);
    Ok(())
}

#[cfg(test)]
mod tests;
