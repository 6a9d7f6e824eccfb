//! `Connector`: for front-ends that listen themselves (QEMU's `server=on`), to connect to.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{share, socket};

/// Between two attempts: a socket that appears is noticed in half of what users are promised.
const RETRY: Duration = Duration::from_millis(50);
/// A session that ends before was none.
const SHORT: Duration = Duration::from_millis(100);
/// So many of them in a row are met as fast as any other; then each pause is twice the last.
const PATIENT: u32 = 4;
/// Pauses get no longer than [`RETRY`] doubled so often: 1.6 s.
const DOUBLED_MAX: u32 = 5;

/// Connects to one socket, again and again.
#[derive(Debug)]
pub struct Connector {
    path: PathBuf,
    /// There was an attempt already: the next one waits.
    tried: bool,
    /// The last connection that was made.
    met: Option<Met>,
}

/// A connection that was made.
#[derive(Debug)]
struct Met {
    at: Instant,
    /// When the next one was wanted first.
    ended: Option<Instant>,
    /// Another socket is another front-end.
    socket: Option<SocketFile>,
    /// How many sessions with this socket ended at once, one after the other.
    short: u32,
}

/// Which file a socket is. Its device and inode alone may be those of one that was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SocketFile {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Met {
    /// The session is over, if it was not before.
    fn end(&mut self) {
        if self.ended.is_none() {
            let now = Instant::now();
            self.ended = Some(now);
            let was_none = now.duration_since(self.at) < SHORT;
            self.short = if was_none {
                self.short.saturating_add(1)
            } else {
                0
            };
        }
    }

    /// How long to leave alone who ended so many sessions at once.
    fn pause(&self) -> Duration {
        match self.short.checked_sub(PATIENT) {
            None => Duration::ZERO,
            Some(more) => RETRY * (1 << more.min(DOUBLED_MAX)),
        }
    }

    fn is_left_alone(&self, there: Option<SocketFile>) -> bool {
        let ended = self.ended.unwrap_or(self.at);
        self.socket == there && ended.elapsed() < self.pause()
    }
}

impl Connector {
    /// Connects to the socket at `path`, which need not be there yet.
    pub fn new(path: &Path) -> Connector {
        Connector {
            path: path.to_owned(),
            tried: false,
            met: None,
        }
    }

    /// The next connection; `None` when `exit` becomes readable first. Waits as long as nobody
    /// listens; a front-end that ends each session at once is met again after a short while only,
    /// which grows to 1.6 s unless another socket takes the place of this one.
    ///
    /// # Errors
    /// When waiting is not possible. A connection that can't be made is no error: it is tried
    /// again.
    pub fn connect_or_exit(&mut self, exit: &impl AsRawFd) -> io::Result<Option<UnixStream>> {
        let mut said = None;
        if let Some(met) = &mut self.met {
            met.end();
        }
        loop {
            let pause = if self.tried { RETRY } else { Duration::ZERO };
            if socket::is_readable_within(exit, pause)? {
                return Ok(None);
            }
            self.tried = true;
            let there = self.socket();
            if self
                .met
                .as_ref()
                .is_some_and(|met| met.is_left_alone(there))
            {
                continue;
            }
            let met = self.met.take().filter(|met| met.socket == there);
            match share::connect(&self.path) {
                Ok(stream) => {
                    self.met = Some(Met {
                        at: Instant::now(),
                        ended: None,
                        socket: there,
                        short: met.map_or(0, |met| met.short),
                    });
                    return Ok(Some(stream));
                }
                Err(error) if said == Some(error.kind()) => {}
                Err(error) => {
                    said = Some(error.kind());
                    let path = self.path.display();
                    tracing::info!("waiting for a front-end to listen on {path}: {error}");
                }
            }
        }
    }

    /// Which socket is at the path now.
    fn socket(&self) -> Option<SocketFile> {
        let found = fs::metadata(&self.path).ok()?;
        Some(SocketFile {
            device: found.dev(),
            inode: found.ino(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn it_waits_for_the_socket_and_comes_again() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let exit = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut connector = Connector::new(&path);
        let waiting = std::thread::spawn(move || {
            let streams: Vec<_> = (0..3)
                .map(|_| connector.connect_or_exit(&exit).unwrap().unwrap())
                .collect();
            (connector, exit, streams)
        });
        let listener = UnixListener::bind(&path).unwrap();
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"x").unwrap();
        }
        let (mut connector, exit, streams) = waiting.join().unwrap();
        assert_eq!(streams.len(), 3);
        exit.write(1).unwrap();
        assert!(connector.connect_or_exit(&exit).unwrap().is_none());
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let pause = |short| {
            Met {
                at: Instant::now(),
                ended: None,
                socket: None,
                short,
            }
            .pause()
        };
        let pauses: Vec<_> = (0..12).map(|short| pause(short).as_millis()).collect();
        assert_eq!(pauses[..5], [0, 0, 0, 0, 50]);
        assert_eq!(pauses[5..], [100, 200, 400, 800, 1600, 1600, 1600]);
    }

    #[test]
    fn who_ends_each_session_at_once_is_left_alone_for_a_while() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let mut listener = UnixListener::bind(&path).unwrap();
        let mut connector = Connector::new(&path);
        let exit = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut meet = |short, since, listener: &UnixListener| {
            if let Some(met) = &mut connector.met {
                (met.short, met.at) = (short, Instant::now() - since);
            }
            let before = Instant::now();
            drop(connector.connect_or_exit(&exit).unwrap().unwrap());
            listener.accept().unwrap();
            (before.elapsed(), connector.met.as_ref().unwrap().short)
        };
        let (at_once, a_while) = (Duration::ZERO, SHORT);
        meet(0, at_once, &listener);
        let (waited, short) = meet(PATIENT + 1, at_once, &listener);
        assert!(
            waited >= 4 * RETRY && short == PATIENT + 2,
            "{waited:?}, {short}"
        );
        // Who stayed for longer is nobody to wait for.
        assert_eq!(meet(u32::MAX, a_while, &listener).1, 0);
        // Nor is another one in its place: a file of the same number, perhaps.
        fs::remove_file(&path).unwrap();
        listener = UnixListener::bind(&path).unwrap();
        let (waited, short) = meet(u32::MAX - 1, at_once, &listener);
        assert!(
            waited < RETRY * (1 << DOUBLED_MAX) && short == 0,
            "{waited:?}, {short}"
        );
    }

    #[test]
    fn it_ends_when_it_is_told_though_nobody_listens() {
        let directory = TempDir::new().unwrap();
        let mut connector = Connector::new(&directory.as_path().join("s"));
        let exit = EventFd::new(EFD_NONBLOCK).unwrap();
        let other = exit.try_clone().unwrap();
        let waiting = std::thread::spawn(move || connector.connect_or_exit(&other));
        exit.write(1).unwrap();
        assert!(waiting.join().unwrap().unwrap().is_none());
    }
}
