//! `Connector`: for front-ends that listen themselves (QEMU's `server=on`), to connect to.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{share, socket};

/// Between two attempts: a socket that appears is noticed in half of what users are promised.
const RETRY: Duration = Duration::from_millis(50);

/// Connects to one socket, again and again.
#[derive(Debug)]
pub struct Connector {
    path: PathBuf,
    /// There was an attempt already: the next one waits.
    tried: bool,
}

impl Connector {
    /// Connects to the socket at `path`, which need not be there yet.
    pub fn new(path: &Path) -> Connector {
        Connector {
            path: path.to_owned(),
            tried: false,
        }
    }

    /// The next connection; `None` when `exit` becomes readable first. Waits as long as nobody
    /// listens; a front-end that ends each session at once is met again after a short while only.
    ///
    /// # Errors
    /// When waiting is not possible. A connection that can't be made is no error: it is tried
    /// again.
    pub fn connect_or_exit(&mut self, exit: &impl AsRawFd) -> io::Result<Option<UnixStream>> {
        let mut said = None;
        loop {
            let pause = if self.tried { RETRY } else { Duration::ZERO };
            if socket::is_readable_within(exit, pause)? {
                return Ok(None);
            }
            self.tried = true;
            match share::connect(&self.path) {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) if said == Some(error.kind()) => {}
                Err(error) => {
                    said = Some(error.kind());
                    let path = self.path.display();
                    tracing::info!("waiting for a front-end to listen on {path}: {error}");
                }
            }
        }
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
