//! The thread of one device: accepts a front-end, serves it, and waits for the next.
//!
//! One front-end at a time: another that connects meanwhile waits in the socket's backlog. The
//! device outlives its sessions, the handler of a connection does not. When a session ends, every
//! vring is stopped and guest memory unmapped before the next begins.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::device::DeviceModel;
use crate::engine::VringRunner;
use crate::sys::link::{LinkWatch, Presence, Seen, Wake};

use super::front_door::{FrontDoor, SessionEnd, Shared, lock};
use super::handler::DeviceSession;
use super::state::{SessionFds, SessionState};

/// After a front-end has put a worker to sleep: nobody is served so long, or it could do so again
/// at once, and again.
const BARRED_FOR: Duration = Duration::from_secs(5);

/// Where connections come from.
pub trait FrontEnds: Send {
    /// The next one; `None` when `wake` becomes readable first, or when it is worth a look.
    ///
    /// # Errors
    /// When there will be no more.
    fn next(&mut self, wake: &Wake) -> io::Result<Option<UnixStream>>;

    /// Until [`FrontEnds::next`] is called again, nobody can connect; or is served, where somebody
    /// else listens.
    fn close(&mut self);
}

/// The link of a net device.
#[derive(Debug, Default)]
pub struct Link {
    /// Tells whether it is up.
    pub watch: Option<LinkWatch>,
    /// While it is down there is no session.
    pub ends_session: bool,
    /// Who is told whether there is a session.
    pub tells: Option<Arc<Presence>>,
}

/// What a disk is on, which may become larger or smaller while it is served, and who serves it,
/// which may change too.
pub trait Medium: Send {
    /// Readable when it is worth a look.
    fn news(&self) -> RawFd;

    /// Looks at it; `in_use` by a front-end, or not. Whether config space has changed by that.
    /// There is no news after it, until there is more.
    fn look(&mut self, in_use: bool) -> bool;
}

/// What may change about a device without a message.
#[derive(Default)]
pub struct Surroundings {
    /// Its link, if it has one.
    pub link: Link,
    /// What it is on, if that may change.
    pub medium: Option<Box<dyn Medium>>,
}

impl core::fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Surroundings")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

impl From<Link> for Surroundings {
    fn from(link: Link) -> Surroundings {
        Surroundings { link, medium: None }
    }
}

/// A device and what runs its vrings.
#[derive(Debug, Clone)]
pub struct Served {
    /// What the front-end is told.
    pub device: Arc<dyn DeviceModel>,
    /// Who runs its vrings.
    pub runner: Arc<dyn VringRunner>,
}

/// Starts the thread that serves `served` until `exit` is written to. The thread returns whether
/// everything could be stopped cleanly.
///
/// # Errors
/// When the thread can't be started.
pub fn spawn(
    served: Served,
    front_ends: Box<dyn FrontEnds>,
    around: impl Into<Surroundings>,
    exit: EventFd,
) -> io::Result<JoinHandle<bool>> {
    let name = format!("ctl-{}", served.device.name());
    let Surroundings { link, medium } = around.into();
    let mut wake = Wake::new(exit, link.watch.as_ref())?;
    if let Some(medium) = &medium {
        wake.also(medium.news())?;
    }
    if let Some(bell) = served.runner.bell() {
        wake.also(bell)?;
    }
    let sessions = Sessions {
        name: format!("{} {}", served.device.kind(), served.device.name()),
        wake,
        served,
        front_ends,
        link,
        medium,
        was_up: true,
        barred_until: None,
    };
    std::thread::Builder::new()
        .name(name)
        .spawn(move || sessions.run())
}

/// One session after another.
struct Sessions {
    name: String,
    served: Served,
    front_ends: Box<dyn FrontEnds>,
    link: Link,
    medium: Option<Box<dyn Medium>>,
    wake: Wake,
    /// The link, as the log has it.
    was_up: bool,
    /// Nobody is served before, because of what the last front-end did.
    barred_until: Option<Instant>,
}

impl Sessions {
    fn run(mut self) -> bool {
        let mut clean = true;
        loop {
            match self.next() {
                Ok(Some(socket)) => {
                    tracing::info!("{}: front-end connected", self.name);
                    self.tell(true);
                    let (end, stopped) = self.serve(socket);
                    clean = stopped;
                    if matches!(end, SessionEnd::Blocking(_)) {
                        tracing::warn!(
                            "{}: session ended: {end}; no other for {BARRED_FOR:?}",
                            self.name
                        );
                        self.barred_until = Some(Instant::now() + BARRED_FOR);
                    } else {
                        tracing::info!("{}: session ended: {end}", self.name);
                    }
                    self.tell(false);
                    if matches!(end, SessionEnd::Exit) {
                        return clean;
                    }
                }
                Ok(None) => return clean,
                Err(error) => {
                    tracing::error!("{}: no more front-ends can connect: {error}", self.name);
                    return false;
                }
            }
        }
    }

    /// The next connection; `None` when the daemon shuts down.
    fn next(&mut self) -> io::Result<Option<UnixStream>> {
        loop {
            if self.wake.exits()? {
                return Ok(None);
            }
            let seen = look(&mut self.link.watch, &self.wake, &self.name);
            self.served.device.set_link(seen.up);
            if let Some(medium) = &mut self.medium {
                medium.look(false);
            }
            let closed = self.link.ends_session && !seen.up;
            if self.was_up != seen.up {
                let what = match (seen.up, self.link.ends_session) {
                    (true, true) => "up: front-ends can connect",
                    (false, true) => "down: no front-end can connect",
                    (true, false) => "up",
                    (false, false) => "down",
                };
                tracing::info!("{}: link is {what}", self.name);
            }
            self.was_up = seen.up;
            // Of vrings that could not be stopped: of no session any more.
            self.served.runner.session_over();
            let now = Instant::now();
            self.barred_until = self.barred_until.filter(|until| *until > now);
            if closed {
                self.front_ends.close();
                self.wake.wait()?;
            } else if let Some(until) = self.barred_until {
                self.front_ends.close();
                self.wake.wait_within(until - now)?;
            } else if let Some(socket) = self.front_ends.next(&self.wake)? {
                return Ok(Some(socket));
            }
        }
    }

    /// Serves a connection as long as it lasts and the link allows.
    fn serve(&mut self, socket: UnixStream) -> (SessionEnd, bool) {
        let Sessions {
            name,
            link,
            medium,
            wake,
            was_up,
            served,
            ..
        } = self;
        // What it is woken by is looked at between two messages.
        let news = |session: &Shared| match wake.exits() {
            Ok(true) => Some(SessionEnd::Exit),
            Ok(false) => {
                if let Some(fd) = served.runner.blocking() {
                    return Some(SessionEnd::Blocking(fd));
                }
                let seen = look(&mut link.watch, wake, name);
                if link.ends_session && seen.was_down {
                    return Some(SessionEnd::LinkDown);
                }
                let mut changed = served.device.set_link(seen.up);
                changed |= medium.as_mut().is_some_and(|medium| medium.look(true));
                if changed {
                    lock(session).config_changed();
                }
                if *was_up != seen.up {
                    let now = if seen.up { "up" } else { "down" };
                    tracing::info!("{name}: link is {now}");
                }
                *was_up = seen.up;
                None
            }
            Err(error) => Some(SessionEnd::Socket(error)),
        };
        serve_while(served, socket, wake, news)
    }

    fn tell(&self, connected: bool) {
        let told = self.link.tells.as_ref().map(|tells| tells.tell(connected));
        if let Some(Err(error)) = told {
            tracing::error!(
                "{}: its peer can't be told of its front-end: {error}",
                self.name
            );
        }
    }
}

/// What has become of the link; up for good when there is none to watch.
fn look(watch: &mut Option<LinkWatch>, wake: &Wake, name: &str) -> Seen {
    if let Some(link) = watch {
        match link.read() {
            Ok(seen) => return seen,
            Err(error) => {
                tracing::error!("{name}: the link can't be watched any more: {error}");
                wake.forget(link);
                *watch = None;
            }
        }
    }
    Seen {
        up: true,
        was_down: false,
    }
}

/// Serves one connection from its first message. Returns how it ended, and whether every vring
/// could be stopped.
pub fn serve(served: &Served, socket: UnixStream, exit: &EventFd) -> (SessionEnd, bool) {
    serve_while(served, socket, exit, |_| Some(SessionEnd::Exit))
}

/// As [`serve`], until `news` says that it is over whenever `wake` is readable.
fn serve_while(
    served: &Served,
    socket: UnixStream,
    wake: &impl AsRawFd,
    mut news: impl FnMut(&Shared) -> Option<SessionEnd>,
) -> (SessionEnd, bool) {
    let session = DeviceSession::new(Arc::clone(&served.device), Arc::clone(&served.runner));
    let session = Arc::new(Shared::new(session));
    let mut door = match FrontDoor::new(socket, Arc::clone(&session)) {
        Ok(door) => door,
        Err(error) => return (SessionEnd::Socket(error), true),
    };
    let end = loop {
        match door.serve(wake) {
            SessionEnd::Exit => {
                if let Some(end) = news(&session) {
                    break end;
                }
            }
            end => break end,
        }
    };
    let mut session = lock(&session);
    let stopped = session.stop_all().is_ok();
    // The socket was shut down for it.
    let end = session.torn().map_or(end, SessionEnd::Torn);
    // It may have hung up before we could.
    let blocking = served.runner.session_over();
    let end = blocking.map_or(end, SessionEnd::Blocking);
    (end, stopped)
}

/// A session that is saved or resumed in its middle, one message at a time.
pub struct Resumable {
    door: FrontDoor,
    session: Arc<Shared>,
}

impl core::fmt::Debug for Resumable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Resumable")
            .field("state", &lock(&self.session).state)
            .finish()
    }
}

impl Resumable {
    /// A session from its first message.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn begin(served: &Served, socket: UnixStream) -> io::Result<Resumable> {
        let session = DeviceSession::new(Arc::clone(&served.device), Arc::clone(&served.runner));
        let session = Arc::new(Shared::new(session));
        Ok(Resumable {
            door: FrontDoor::new(socket, Arc::clone(&session))?,
            session,
        })
    }

    /// A session that goes on where [`Resumable::save`] left it.
    ///
    /// # Errors
    /// When the state does not fit the device, or its memory can't be mapped.
    pub fn resume(
        served: &Served,
        socket: UnixStream,
        state: SessionState,
        fds: SessionFds,
    ) -> io::Result<Resumable> {
        let device = Arc::clone(&served.device);
        let session = DeviceSession::resume(device, Arc::clone(&served.runner), state, fds)
            .map_err(io::Error::other)?;
        let session = Arc::new(Shared::new(session));
        match FrontDoor::resume(socket, Arc::clone(&session)) {
            Ok(door) => Ok(Resumable { door, session }),
            Err(error) => {
                // The vrings that run again are nobody's now.
                lock(&session).stop_all().map_err(io::Error::other)?;
                Err(error)
            }
        }
    }

    /// Serves one message.
    ///
    /// # Errors
    /// How the session ended.
    pub fn step(&mut self, exit: &EventFd) -> Result<(), SessionEnd> {
        self.door.step(exit)
    }

    /// Stops the vrings and takes everything that is needed to go on elsewhere. The connection
    /// stays open as long as the caller has another handle on it.
    ///
    /// # Errors
    /// When a vring can't be stopped.
    pub fn save(self) -> io::Result<(SessionState, SessionFds)> {
        let mut session = lock(&self.session);
        session.stop_all().map_err(io::Error::other)?;
        Ok((session.state.clone(), core::mem::take(&mut session.fds)))
    }
}
