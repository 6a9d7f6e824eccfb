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
    /// The socket's device and inode: another one is another front-end.
    socket: Option<(u64, u64)>,
    /// How many sessions with this socket ended at once, this one not counted yet.
    short: u32,
}

impl Met {
    /// How long to leave alone who ended so many sessions at once.
    fn pause(&self) -> Duration {
        match self.short.checked_sub(PATIENT) {
            None => Duration::ZERO,
            Some(more) => RETRY * (1 << more.min(DOUBLED_MAX)),
        }
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
        let ended = Instant::now();
        if let Some(met) = &mut self.met {
            let was_none = ended.duration_since(met.at) < SHORT;
            met.short = if was_none {
                met.short.saturating_add(1)
            } else {
                0
            };
        }
        loop {
            let pause = if self.tried { RETRY } else { Duration::ZERO };
            if socket::is_readable_within(exit, pause)? {
                return Ok(None);
            }
            self.tried = true;
            let there = self.socket();
            if let Some(met) = &self.met
                && met.socket == there
                && ended.elapsed() < met.pause()
            {
                continue;
            }
            match share::connect(&self.path) {
                Ok(stream) => {
                    let met = self.met.take().filter(|met| met.socket == there);
                    self.met = Some(Met {
                        at: Instant::now(),
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
    fn socket(&self) -> Option<(u64, u64)> {
        let found = fs::metadata(&self.path).ok()?;
        Some((found.dev(), found.ino()))
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
    fn who_ends_each_session_at_once_is_met_ever_more_rarely() {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let mut listener = UnixListener::bind(&path).unwrap();
        let mut connector = Connector::new(&path);
        let exit = EventFd::new(EFD_NONBLOCK).unwrap();
        let meet = |connector: &mut Connector, listener: &UnixListener| {
            let before = Instant::now();
            drop(connector.connect_or_exit(&exit).unwrap().unwrap());
            listener.accept().unwrap();
            before.elapsed()
        };
        let mut pauses: Vec<_> = (0..7).map(|_| meet(&mut connector, &listener)).collect();
        pauses.dedup_by_key(|pause| pause.as_millis() / 50);
        let expected = [0, 50, 100, 200].map(Duration::from_millis);
        assert!(pauses.len() >= expected.len(), "{pauses:?}");
        for (pause, least) in pauses.iter().zip(expected) {
            assert!(*pause >= least, "{pauses:?}");
        }
        // Another one in its place is nobody to wait for.
        let other = directory.as_path().join("t");
        let next = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        listener = next;
        meet(&mut connector, &listener);
        assert_eq!(connector.met.as_ref().unwrap().short, 0);
        // Nor is who stayed for a while.
        connector.met.as_mut().unwrap().short = 9;
        connector.met.as_mut().unwrap().at -= SHORT;
        meet(&mut connector, &listener);
        assert_eq!(connector.met.as_ref().unwrap().short, 0);
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
