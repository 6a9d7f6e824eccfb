//! A stand-in for the engine: takes what control says, keeps its rules, and tells the test.
//!
//! It finds ring areas in guest memory as the real one does, refuses to start a vring twice or to
//! stop one that is not started, writes to the call and err fds that it is given, and holds the
//! memory table while a vring is started.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use crossbeam::channel::{Receiver, Sender, unbounded};
use crossbeam::queue::SegQueue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::engine::{BlockingFd, EngineError, FdKind, VringAddr, VringRunner, VringSetup};
use vringd::memory::GuestRam;
use vringd::ring::{Areas, Packed, Split};

use super::message::F_RING_PACKED;

/// What the fake writes to a call fd, and to an err fd, when it gets one.
pub const CALLED: u64 = 5;
pub const ERRED: u64 = 7;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Negotiated(u64),
    Start(Started),
    Stop(u16),
    Pause(u16, bool),
    /// Whether there is a call fd, and an err fd.
    Call(u16, bool, bool),
    /// How many regions the new table has.
    Swap(u16, usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    pub index: u16,
    pub size: u16,
    pub features: u64,
    pub base: Option<u32>,
    /// What the kick fd held; `None` without one.
    pub kick: Option<u64>,
    pub call: bool,
    pub err: bool,
}

#[derive(Debug, Default)]
struct Vring {
    started: AtomicBool,
    position: AtomicU32,
    size: AtomicU32,
    packed: AtomicBool,
    /// The memory table that it uses: at most one.
    ram: SegQueue<Arc<GuestRam>>,
}

#[derive(Debug)]
pub struct FakeRunner {
    events: Sender<Event>,
    vrings: Vec<Vring>,
    /// Stops meet their deadline, as with a disk that does not answer.
    pub stuck: AtomicBool,
    /// A worker slept in an fd.
    pub blocking: AtomicBool,
    /// What is readable then.
    pub bell: EventFd,
}

impl FakeRunner {
    pub fn new(vrings: u16) -> (Arc<FakeRunner>, Receiver<Event>) {
        let (events, told) = unbounded();
        let vrings = (0..vrings).map(|_| Vring::default()).collect();
        let stuck = AtomicBool::new(false);
        let runner = FakeRunner {
            events,
            vrings,
            stuck,
            blocking: AtomicBool::new(false),
            bell: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        (Arc::new(runner), told)
    }

    /// Lets a started vring stand at `base`.
    pub fn advance(&self, index: u16, base: u32) {
        self.vrings[usize::from(index)].position.store(base, SeqCst);
    }

    /// The indices of the vrings that are started.
    pub fn started(&self) -> Vec<usize> {
        let is_started = |at: &usize| self.vrings[*at].started.load(SeqCst);
        (0..self.vrings.len()).filter(is_started).collect()
    }

    fn tell(&self, event: Event) {
        // A test that has seen enough does not listen any more.
        let _ = self.events.send(event);
    }

    fn vring(&self, index: u16) -> Result<&Vring, EngineError> {
        let vring = &self.vrings[usize::from(index)];
        let started = vring.started.load(SeqCst);
        started.then_some(vring).ok_or(EngineError::State { index })
    }
}

fn find(
    index: u16,
    packed: bool,
    size: u16,
    ram: &Arc<GuestRam>,
    addr: VringAddr,
) -> Result<(), EngineError> {
    let (desc, driver, device) = (addr.desc, addr.driver, addr.device);
    if packed {
        Areas::find::<Packed>(ram, size, desc, driver, device)
    } else {
        Areas::find::<Split>(ram, size, desc, driver, device)
    }
    .map(drop)
    .map_err(|source| EngineError::Memory { index, source })
}

fn notify(call: Option<&EventFd>, err: Option<&EventFd>) {
    for (fd, value) in [(call, CALLED), (err, ERRED)] {
        if let Some(fd) = fd {
            fd.write(value).unwrap();
        }
    }
}

impl VringRunner for FakeRunner {
    fn start(&self, setup: VringSetup) -> Result<(), EngineError> {
        let index = setup.index;
        let vring = &self.vrings[usize::from(index)];
        let packed = setup.features & F_RING_PACKED != 0;
        find(index, packed, setup.size, &setup.ram, setup.addr)?;
        if vring.started.swap(true, SeqCst) {
            return Err(EngineError::State { index });
        }
        notify(setup.call.as_ref(), setup.err.as_ref());
        vring.position.store(setup.base.unwrap_or(0), SeqCst);
        vring.size.store(u32::from(setup.size), SeqCst);
        vring.packed.store(packed, SeqCst);
        vring.ram.push(setup.ram);
        self.tell(Event::Start(Started {
            index,
            size: setup.size,
            features: setup.features,
            base: setup.base,
            kick: setup.kick.map(|kick| kick.read().unwrap_or(0)),
            call: setup.call.is_some(),
            err: setup.err.is_some(),
        }));
        Ok(())
    }

    fn stop(&self, index: u16) -> Result<u32, EngineError> {
        let vring = self.vring(index)?;
        if self.stuck.load(SeqCst) {
            let (in_flight, waited_ms) = (1, 0);
            return Err(EngineError::Draining {
                index,
                in_flight,
                waited_ms,
            });
        }
        vring.started.store(false, SeqCst);
        drop(vring.ram.pop());
        self.tell(Event::Stop(index));
        Ok(vring.position.load(SeqCst))
    }

    fn pause(&self, index: u16, paused: bool) -> Result<(), EngineError> {
        self.vring(index)?;
        self.tell(Event::Pause(index, paused));
        Ok(())
    }

    fn set_call(
        &self,
        index: u16,
        call: Option<EventFd>,
        err: Option<EventFd>,
    ) -> Result<(), EngineError> {
        self.vring(index)?;
        notify(call.as_ref(), err.as_ref());
        self.tell(Event::Call(index, call.is_some(), err.is_some()));
        Ok(())
    }

    fn swap(&self, index: u16, ram: Arc<GuestRam>, addr: VringAddr) -> Result<(), EngineError> {
        let vring = self.vring(index)?;
        let size = u16::try_from(vring.size.load(SeqCst)).unwrap();
        find(index, vring.packed.load(SeqCst), size, &ram, addr)?;
        let regions = ram.len();
        vring.ram.push(ram);
        drop(vring.ram.pop());
        self.tell(Event::Swap(index, regions));
        Ok(())
    }

    fn negotiated(&self, features: u64) -> io::Result<()> {
        self.tell(Event::Negotiated(features));
        Ok(())
    }

    fn bell(&self) -> Option<RawFd> {
        Some(self.bell.as_raw_fd())
    }

    fn blocking(&self) -> Option<BlockingFd> {
        let (vring, kind) = (1, FdKind::Call);
        let blocks = self.blocking.load(SeqCst);
        blocks.then_some(BlockingFd { vring, kind })
    }

    fn session_over(&self) -> Option<BlockingFd> {
        let found = self.blocking();
        self.blocking.store(false, SeqCst);
        let _ = self.bell.read();
        found
    }
}
