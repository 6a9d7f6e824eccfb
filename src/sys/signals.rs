//! The signals of the daemon, received one at a time where somebody waits for them.
//!
//! They are blocked in the first thread before any other exists, so that every thread inherits
//! the mask and none is ever interrupted; a signalfd then delivers them. See signalfd(2).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

/// A signal that the daemon acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: stop.
    Terminate,
    /// SIGINT: stop; from the keyboard, usually.
    Interrupt,
    /// SIGUSR1.
    User1,
    /// SIGHUP.
    Hangup,
}

const SIGNALS: [(libc::c_int, Signal); 4] = [
    (libc::SIGTERM, Signal::Terminate),
    (libc::SIGINT, Signal::Interrupt),
    (libc::SIGUSR1, Signal::User1),
    (libc::SIGHUP, Signal::Hangup),
];

/// Where the blocked signals arrive.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals for this thread and those that it starts from now on, and ignores
    /// SIGPIPE for the process: a front-end that goes away is an error of a write.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn block() -> io::Result<Self> {
        let set = signal_set();
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let error =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: SIG_IGN runs no code of ours.
        if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    /// What poll(2) and read(2) say.
    pub fn wait(&self) -> io::Result<Signal> {
        loop {
            if let Some(signal) = self.take()? {
                return Ok(signal);
            }
            self.poll(-1)?;
        }
    }

    /// Waits for the next signal, but not longer than `timeout`.
    ///
    /// # Errors
    /// What poll(2) and read(2) say.
    pub fn wait_timeout(&self, timeout: Duration) -> io::Result<Option<Signal>> {
        let start = Instant::now();
        loop {
            if let Some(signal) = self.take()? {
                return Ok(Some(signal));
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            // Rounded up, or the last millisecond would be spent in a busy loop.
            let millis = left.as_micros().div_ceil(1000);
            self.poll(libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX))?;
        }
    }

    /// The next signal that has arrived already, if any.
    fn take(&self) -> io::Result<Option<Signal>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes at most `size` bytes, which `info` has.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(read) != Ok(size) {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the kernel has filled the whole structure.
        let info = unsafe { info.assume_init() };
        let known = SIGNALS
            .iter()
            .find(|(number, _)| number.cast_unsigned() == info.ssi_signo);
        Ok(known.map(|(_, signal)| *signal))
    }

    fn poll(&self, timeout_ms: libc::c_int) -> io::Result<()> {
        let mut fd = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one initialised entry, as the count says.
        if unsafe { libc::poll(&raw mut fd, 1, timeout_ms) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn signal_set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: just initialised.
    let mut set = unsafe { set.assume_init() };
    for (number, _) in SIGNALS {
        // SAFETY: an initialised set and a valid signal number.
        unsafe { libc::sigaddset(&raw mut set, number) };
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To this thread only: other tests run in the same process.
    fn send(number: libc::c_int) {
        // SAFETY: pthread_self is a live thread, and the signal is blocked in it.
        let error = unsafe { libc::pthread_kill(libc::pthread_self(), number) };
        assert_eq!(error, 0);
    }

    #[test]
    fn each_signal_arrives_by_name_and_kills_nobody() {
        let signals = Signals::block().unwrap();
        for (number, expected) in SIGNALS {
            send(number);
            assert_eq!(signals.wait().unwrap(), expected);
        }
        assert_eq!(signals.wait_timeout(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn a_wait_ends_at_its_timeout_and_not_before() {
        let signals = Signals::block().unwrap();
        let start = Instant::now();
        let timeout = Duration::from_millis(20);
        assert_eq!(signals.wait_timeout(timeout).unwrap(), None);
        assert!(start.elapsed() >= timeout);
    }

    #[test]
    fn a_signal_that_came_before_the_wait_is_not_lost() {
        let signals = Signals::block().unwrap();
        send(libc::SIGTERM);
        let found = signals.wait_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(found, Some(Signal::Terminate));
    }

    #[test]
    fn threads_inherit_the_mask() {
        let _signals = Signals::block().unwrap();
        let inherited = std::thread::spawn(|| {
            let mut mask = signal_set();
            // SAFETY: `mask` is initialised and receives the mask; none is set.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask) };
            // SAFETY: `mask` is initialised.
            SIGNALS.map(|(number, _)| unsafe { libc::sigismember(&raw const mask, number) })
        });
        assert_eq!(inherited.join().unwrap(), [1; 4]);
    }
}
