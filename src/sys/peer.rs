//! A connected front-end socket: looking at a message before it is read.
//!
//! `MSG_PEEK` leaves attached descriptors queued, so a message can be looked at here and read by
//! somebody else. See recv(2), unix(7).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::socket::is_unix_stream;

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// The socket is ready for what was waited for, or the peer is gone.
    Socket,
    /// The other descriptor became readable.
    Exit,
}

/// Tells of every arrival at a socket once, so that waiting for the rest of a message sleeps.
///
/// poll(2) on a Unix socket reports any byte that is there, again and again, and pays no heed to
/// SO_RCVLOWAT; an edge-triggered epoll reports only what is new.
#[derive(Debug)]
pub struct Arrivals(Epoll);

impl Arrivals {
    /// The arrivals at `socket`. What waits there already counts as one.
    ///
    /// # Errors
    /// What epoll_create1(2) or epoll_ctl(2) says.
    pub fn new(socket: &UnixStream) -> io::Result<Arrivals> {
        let epoll = Epoll::new()?;
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, 0);
        epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        Ok(Arrivals(epoll))
    }

    /// Waits until something has arrived since the last call (or the peer has gone), or `exit` is
    /// readable.
    ///
    /// # Errors
    /// What poll(2) or epoll_wait(2) says.
    pub fn wait(&self, exit: &impl AsRawFd) -> io::Result<Ready> {
        let ready = poll_with_exit(self.0.as_raw_fd(), libc::POLLIN, exit, FOREVER)?;
        if ready == Some(Ready::Socket) {
            // Takes the report; the next one is of something new.
            self.0.wait(0, &mut [EpollEvent::default()])?;
        }
        Ok(ready.unwrap_or(Ready::Socket))
    }
}

/// Waits until an answer can be written without blocking, or `exit` is readable, which comes first.
///
/// The kernel calls a Unix socket writable while less than a quarter of its buffer is in use, and
/// no buffer is smaller than a few of the largest answers.
///
/// # Errors
/// What poll(2) says.
pub fn wait_writable(socket: &UnixStream, exit: &impl AsRawFd) -> io::Result<Ready> {
    let ready = poll_with_exit(socket.as_raw_fd(), libc::POLLOUT, exit, FOREVER)?;
    Ok(ready.unwrap_or(Ready::Socket))
}

const FOREVER: libc::c_int = -1;

/// `None` when `timeout` milliseconds have passed.
fn poll_with_exit(
    fd: RawFd,
    events: libc::c_short,
    exit: &impl AsRawFd,
    timeout: libc::c_int,
) -> io::Result<Option<Ready>> {
    let entry = |fd: RawFd, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let mut fds = [entry(fd, events), entry(exit.as_raw_fd(), libc::POLLIN)];
    loop {
        // SAFETY: `fds` has two entries and outlives the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) } >= 0 {
            return Ok(match fds.map(|entry| entry.revents != 0) {
                [_, true] => Some(Ready::Exit),
                [true, false] => Some(Ready::Socket),
                [false, false] => None,
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Copies what waits in `socket` to `bytes` without taking it; 0 means that the peer is gone.
///
/// # Errors
/// What recv(2) says.
pub fn peek(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is writable for its length.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            libc::MSG_PEEK,
        )
    };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// More descriptors than come with a message (SCM_MAX_FD), and an even number: control messages are
/// padded to eight bytes, so that the kernel may deliver one more than an odd number has room for.
const FDS_MAX: usize = 254;

/// Reads what is there, up to `bytes`, and the first descriptor that came along. All others are
/// closed.
///
/// # Errors
/// What recvmsg(2) says.
pub fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut fds: [RawFd; FDS_MAX] = [-1; FDS_MAX];
    let mut whole = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }];
    // SAFETY: the vector names `bytes`, which is writable and holds plain bytes.
    let (read, count) = unsafe { socket.recv_with_fds(&mut whole, &mut fds) }?;
    // SAFETY: the kernel has just made these descriptors for us; nothing else owns them.
    let own = |&fd: &RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
    let mut owned: Vec<OwnedFd> = fds[..count].iter().map(own).collect();
    owned.truncate(1);
    Ok((read, owned.pop()))
}

/// Bytes that wait in `socket`.
///
/// # Errors
/// What ioctl(2) says.
pub fn waiting(socket: &UnixStream) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Puts the connection of `with` in the place of the descriptor `place`: whoever owns that goes on
/// with the other connection.
///
/// # Errors
/// What dup3(2) says.
pub fn replace(place: &impl AsRawFd, with: &UnixStream) -> io::Result<()> {
    // SAFETY: both descriptors are open; the one replaced keeps its number and its owner.
    let fd = unsafe { libc::dup3(with.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if fd < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Whether the peer has closed its side: nothing more will come.
///
/// # Errors
/// What poll(2) says.
pub fn hung_up(socket: &UnixStream) -> io::Result<bool> {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call.
    if unsafe { libc::poll(&raw mut entry, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(entry.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0)
}

/// The end of a channel that a front-end has passed.
///
/// # Errors
/// When it is no Unix stream socket.
pub fn adopt(file: File) -> io::Result<UnixStream> {
    let fd = OwnedFd::from(file);
    if is_unix_stream(fd.as_fd())? {
        Ok(UnixStream::from(fd))
    } else {
        Err(io::Error::other("it is no Unix stream socket"))
    }
}

/// Sends `bytes` whole without waiting.
///
/// # Errors
/// What send(2) says, or that there was no room for all.
pub fn send_now(socket: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is readable for its length.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    };
    match usize::try_from(sent) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vmm_sys_util::eventfd::EventFd;

    fn pair() -> (UnixStream, UnixStream, EventFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, theirs, EventFd::new(0).unwrap())
    }

    #[test]
    fn an_arrival_is_told_once_although_nobody_reads() {
        let (mut ours, theirs, exit) = pair();
        let arrivals = Arrivals::new(&theirs).unwrap();
        let is_told = || {
            let fd = arrivals.0.as_raw_fd();
            poll_with_exit(fd, libc::POLLIN, &exit, 0)
                .unwrap()
                .is_some()
        };
        assert!(!is_told());
        for _ in 0..3 {
            ours.write_all(b"abc").unwrap();
            assert!(is_told());
            assert_eq!(arrivals.wait(&exit).unwrap(), Ready::Socket);
            assert!(!is_told());
        }
        assert_eq!(waiting(&theirs).unwrap(), 9);
        assert!(!hung_up(&theirs).unwrap());
        drop(ours);
        assert_eq!(arrivals.wait(&exit).unwrap(), Ready::Socket);
        assert!(hung_up(&theirs).unwrap());
    }

    #[test]
    fn the_exit_comes_before_everything_else() {
        let (mut ours, theirs, exit) = pair();
        let arrivals = Arrivals::new(&theirs).unwrap();
        assert_eq!(wait_writable(&theirs, &exit).unwrap(), Ready::Socket);
        ours.write_all(b"abc").unwrap();
        exit.write(1).unwrap();
        assert_eq!(wait_writable(&theirs, &exit).unwrap(), Ready::Exit);
        assert_eq!(arrivals.wait(&exit).unwrap(), Ready::Exit);
    }

    #[test]
    fn of_descriptors_the_first_comes_and_all_others_are_closed() {
        for count in [0, 1, 2, 3, 4, 253] {
            let (ours, theirs, _exit) = pair();
            let (kept, sent): (Vec<_>, Vec<_>) =
                (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
            let raw: Vec<RawFd> = sent.iter().map(AsRawFd::as_raw_fd).collect();
            ours.send_with_fds(&[&b"abc"[..]], &raw).unwrap();
            drop(sent);
            let mut bytes = [0; 3];
            let (read, first) = receive(&theirs, &mut bytes).unwrap();
            assert_eq!((read, &bytes), (3, b"abc"));
            let open = || kept.iter().map(|end| !hung_up(end).unwrap());
            assert_eq!(first.is_some(), count > 0);
            assert_eq!(open().filter(|&open| open).count(), count.min(1));
            assert_eq!(open().next(), first.as_ref().map(|_| true));
            drop(first);
            assert!(!open().any(|open| open), "{count} descriptors");
        }
    }
}
