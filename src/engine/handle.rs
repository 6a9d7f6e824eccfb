//! `DeviceHandle`: one device's vrings in the engine, as control sees them.
//!
//! Builds endpoints on the calling thread, sends them to the worker that the placement names, and
//! waits for answers with a deadline. What comes back is dropped here, off the polling cores.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::ring::{Areas, Packed, RingFormat, Split};

use super::build::{EngineOptions, Member, Parts};
use super::fabric::Running;
use super::mailbox::{CallFds, Command, Leave, Mailbox, Stopped};
use super::moves::Moves;
use super::runner::{BlockingFd, EngineError, VringAddr, VringRunner, VringSetup};
use super::started::VringCounters;
use super::telling::{Blocking, Teller};
use super::topology::Topology;

/// How long a worker may take to answer anything but a stop: many turns of the longest loop.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Where a vring can live: fixed when the daemon starts.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) mailbox: Arc<Mailbox>,
    /// Number of the worker.
    pub(super) worker: usize,
    /// The memory node that it was chosen for.
    pub(super) node: Option<usize>,
    pub(super) slot: usize,
    /// Kept by the worker.
    pub(super) running: Running,
    /// Bursts of a transmit vring that may be pending.
    pub(super) bursts: usize,
    /// Number of descriptors that the vring was last started with.
    pub(super) size: AtomicU16,
    pub(super) counters: Arc<VringCounters>,
}

/// The vrings of one device.
#[derive(Debug)]
pub struct DeviceHandle {
    name: String,
    pub(super) parts: Parts,
    /// Groups of places, in each one for every vring. For a disk a group is a worker.
    pub(super) places: Vec<Vec<Place>>,
    /// The group in which each vring is, or was last.
    pub(super) group: Vec<AtomicUsize>,
    pub(super) started: Vec<AtomicBool>,
    /// An fd of the session that a worker slept in.
    blocking: Arc<Blocking>,
    pub(super) cores: Vec<usize>,
    pub(super) topology: Topology,
    /// How a disk's vrings go from one worker to another.
    pub(super) moves: Moves,
    /// Vrings started on a core that is far from their memory.
    remote_starts: AtomicU64,
    /// How long a stop waits for requests in flight.
    stop_timeout: Duration,
    /// The features that the vrings were last started with: they tell the ring format.
    features: AtomicU64,
}

impl DeviceHandle {
    /// Of device number `number`.
    pub(super) fn new(
        number: usize,
        device: Member,
        places: Vec<Vec<Place>>,
        blocking: Arc<Blocking>,
        options: &EngineOptions,
    ) -> DeviceHandle {
        let vrings = places.first().map_or(0, Vec::len);
        DeviceHandle {
            name: device.parts.model().name().to_owned(),
            moves: Moves::new(number, &device.cores, vrings, options),
            parts: device.parts,
            places,
            blocking,
            group: (0..vrings).map(|_| AtomicUsize::new(0)).collect(),
            started: (0..vrings).map(|_| AtomicBool::new(false)).collect(),
            cores: options.cores.clone(),
            topology: options.topology,
            remote_starts: AtomicU64::new(0),
            stop_timeout: options.stop_timeout,
            features: AtomicU64::new(0),
        }
    }

    fn place(&self, index: u16) -> Result<&Place, EngineError> {
        let at = usize::from(index);
        let group = self
            .group
            .get(at)
            .map(|group| group.load(Ordering::Relaxed));
        group
            .and_then(|group| self.places.get(group)?.get(at))
            .ok_or(EngineError::State { index })
    }

    /// Chooses where a vring is started: near to its memory, and where the vring is that it shares
    /// a link with. Says so when it ends up far from its memory.
    fn choose(&self, setup: &VringSetup) -> Result<(), EngineError> {
        let at = usize::from(setup.index);
        let memory = (self.topology.of_memory)(&setup.ram, setup.addr.desc);
        let near = |group: &Vec<Place>| group.first().is_some_and(|place| place.node == memory);
        let partner = match self.parts {
            Parts::Net(..) => Some(at ^ 1),
            Parts::Blk(..) => None,
        };
        let with = partner.filter(|&partner| {
            let started = self.started.get(partner);
            started.is_some_and(|started| started.load(Ordering::Relaxed))
        });
        let group = match with {
            Some(partner) => self.group[partner].load(Ordering::Relaxed),
            None if partner.is_none() => self.choose_worker(at, memory),
            None => self.places.iter().position(near).unwrap_or(0),
        };
        if let Some(chosen) = self.group.get(at) {
            chosen.store(group, Ordering::Relaxed);
        }
        let core = self.cores[self.place(setup.index)?.worker];
        let own = (self.topology.of_core)(core);
        if let (Some(own), Some(memory)) = (own, memory)
            && own != memory
        {
            let earlier = self.remote_starts.fetch_add(1, Ordering::Relaxed);
            let none_runs = self.started.iter().all(|s| !s.load(Ordering::Relaxed));
            if none_runs || earlier == 0 {
                let or = if self.parts.stay() {
                    ""
                } else {
                    ", or placement = \"auto\""
                };
                tracing::warn!(
                    "{} vring {}: served on core {core} of node {own}, its memory is on node \
                     {memory}: give it a core there{or}",
                    self.name,
                    setup.index
                );
            }
        }
        Ok(())
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask<T>(
        &self,
        index: u16,
        within: Duration,
        command: Command,
        answer: &Receiver<T>,
    ) -> Result<T, EngineError> {
        let term = Term::of(within);
        self.tell(index, term, command)?;
        hear(index, term, answer)
    }

    fn tell(&self, index: u16, term: Term, command: Command) -> Result<(), EngineError> {
        let sent = self.place(index)?.mailbox.send(command, term.deadline);
        sent.map_err(|_| timeout(index, term.within))
    }

    /// Tells a vring to stop; its answer comes when it holds nothing any more.
    fn begin_stop(&self, index: u16, term: Term) -> Result<Receiver<Stopped>, EngineError> {
        let slot = self.place(index)?.slot;
        // As in `end_stop`, whatever it says.
        let _ = self.parts.stopping(index);
        let (reply, answer) = bounded(1);
        let how = Leave::Drained;
        self.tell(index, term, Command::Stop { slot, how, reply })?;
        Ok(answer)
    }

    fn end_stop(
        &self,
        index: u16,
        term: Term,
        answer: Result<Receiver<Stopped>, EngineError>,
    ) -> Result<u32, EngineError> {
        let place = self.place(index)?;
        let stopped = answer.and_then(|answer| hear(index, term, &answer));
        self.moves.lost(index, stopped.is_err());
        match stopped {
            Ok(stopped) => {
                self.started[usize::from(index)].store(false, Ordering::Relaxed);
                // A tap that is gone has no queue to detach; the vring is stopped all the same.
                let _ = self.parts.served(index, false);
                Ok(stopped.base)
            }
            Err(EngineError::Timeout { waited_ms, .. }) if place.counters.in_flight.get() > 0 => {
                let in_flight = u32::try_from(place.counters.in_flight.get()).unwrap_or(u32::MAX);
                Err(EngineError::Draining {
                    index,
                    in_flight,
                    waited_ms,
                })
            }
            Err(error) => Err(error),
        }
    }

    fn is_packed(features: u64) -> bool {
        features & (1 << VIRTIO_F_RING_PACKED) != 0
    }

    fn areas<F: RingFormat>(setup: &VringSetup) -> Result<Areas, EngineError> {
        find_areas::<F>(setup.index, setup.size, &setup.ram, setup.addr)
    }

    /// A place of each vring: what is counted is the same at all.
    fn vrings(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().take(1).flatten()
    }

    /// The drain has its deadline, and the answer some time on top.
    fn stop_term(&self) -> Term {
        Term::of(self.stop_timeout + Duration::from_millis(500))
    }

    /// Requests in flight on all vrings, for the line that a hurried shutdown prints.
    pub fn in_flight(&self) -> u64 {
        self.vrings()
            .map(|place| place.counters.in_flight.get())
            .sum()
    }

    /// Sums of the vrings' own counters, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum =
            |of: fn(&VringCounters) -> u64| self.vrings().map(|place| of(&place.counters)).sum();
        let mut counters = vec![
            ("calls", sum(|c| c.calls.get())),
            ("blocked_calls", sum(|c| c.blocked.get())),
            ("ring_faults", sum(|c| c.faults.get())),
            (
                "vrings_remote_memory",
                self.remote_starts.load(Ordering::Relaxed),
            ),
        ];
        if matches!(self.parts, Parts::Blk(..)) {
            counters.push(("vrings_moved", self.moves.done()));
        }
        counters.extend(self.parts.host_counters());
        counters
    }
}

/// How long an answer may take, and until when.
#[derive(Clone, Copy)]
struct Term {
    within: Duration,
    deadline: Instant,
}

impl Term {
    fn of(within: Duration) -> Term {
        Term {
            within,
            deadline: Instant::now() + within,
        }
    }
}

/// Waits for an answer.
fn hear<T>(index: u16, term: Term, answer: &Receiver<T>) -> Result<T, EngineError> {
    match answer.recv_deadline(term.deadline) {
        Ok(answer) => Ok(answer),
        Err(RecvTimeoutError::Timeout) => Err(timeout(index, term.within)),
        // The worker dropped the sender without an answer: there is no such vring.
        Err(RecvTimeoutError::Disconnected) => Err(EngineError::State { index }),
    }
}

/// A worker has not answered for so long.
pub(super) fn timeout(index: u16, within: Duration) -> EngineError {
    let waited_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
    EngineError::Timeout { index, waited_ms }
}

fn find_areas<F: RingFormat>(
    index: u16,
    size: u16,
    ram: &Arc<GuestRam>,
    addr: VringAddr,
) -> Result<Areas, EngineError> {
    Areas::find::<F>(ram, size, addr.desc, addr.driver, addr.device)
        .map_err(|source| EngineError::Memory { index, source })
}

impl VringRunner for DeviceHandle {
    fn start(&self, setup: VringSetup) -> Result<(), EngineError> {
        let index = setup.index;
        self.choose(&setup)?;
        let place = self.place(index)?;
        self.features.store(setup.features, Ordering::Relaxed);
        place.size.store(setup.size, Ordering::Relaxed);
        let label = format!("{} vring {index}", self.name);
        let teller = Teller::new(index, Arc::clone(&self.blocking));
        let endpoint = if Self::is_packed(setup.features) {
            let areas = Self::areas::<Packed>(&setup)?;
            self.parts
                .endpoint::<Packed>(setup, teller, areas, label, place)
        } else {
            let areas = Self::areas::<Split>(&setup)?;
            self.parts
                .endpoint::<Split>(setup, teller, areas, label, place)
        };
        let endpoint = endpoint.map_err(|fault| EngineError::Ring { index, fault })?;
        self.parts
            .served(index, true)
            .map_err(|source| EngineError::System { index, source })?;
        if let Err((error, endpoint)) = self.enter(index, place, endpoint, false) {
            // Nobody reads what would come, unless the worker has it and is merely late. The error
            // that matters is the first.
            if endpoint.is_some() {
                let _ = self.parts.served(index, false);
            }
            return Err(error);
        }
        self.started[usize::from(index)].store(true, Ordering::Relaxed);
        self.moves.lost(index, false);
        Ok(())
    }

    fn stop(&self, index: u16) -> Result<u32, EngineError> {
        let term = self.stop_term();
        self.end_stop(index, term, self.begin_stop(index, term))
    }

    fn stop_all(&self, indices: &[u16]) -> Vec<Result<u32, EngineError>> {
        let term = self.stop_term();
        let begin = |&index: &u16| (index, self.begin_stop(index, term));
        // They drain beside each other: a disk that answers nothing takes the time of one.
        let stopping: Vec<_> = indices.iter().map(begin).collect();
        let end = |(index, answer)| self.end_stop(index, term, answer);
        stopping.into_iter().map(end).collect()
    }

    fn pause(&self, index: u16, paused: bool) -> Result<(), EngineError> {
        if !paused {
            // Before the worker is told: it begins to wait for the host's side then.
            let attached = self.parts.paused(index, false);
            attached.map_err(|source| EngineError::System { index, source })?;
        }
        let (reply, answer) = bounded(1);
        let command = Command::Pause {
            slot: self.place(index)?.slot,
            paused,
            reply,
        };
        self.ask(index, ANSWER_WITHIN, command, &answer)?;
        if paused {
            // As in `end_stop`, whatever it says.
            let _ = self.parts.paused(index, true);
        }
        Ok(())
    }

    fn set_call(
        &self,
        index: u16,
        call: Option<EventFd>,
        err: Option<EventFd>,
    ) -> Result<(), EngineError> {
        let (reply, answer) = bounded(1);
        let fds = CallFds { call, err };
        let command = Command::Call {
            slot: self.place(index)?.slot,
            fds,
            reply,
        };
        self.ask(index, ANSWER_WITHIN, command, &answer).map(drop)
    }

    fn swap(&self, index: u16, ram: Arc<GuestRam>, addr: VringAddr) -> Result<(), EngineError> {
        let size = self.place(index)?.size.load(Ordering::Relaxed);
        let areas = if Self::is_packed(self.features.load(Ordering::Relaxed)) {
            find_areas::<Packed>(index, size, &ram, addr)?
        } else {
            find_areas::<Split>(index, size, &ram, addr)?
        };
        let (reply, answer) = bounded(1);
        let command = Command::Swap {
            slot: self.place(index)?.slot,
            ram,
            areas,
            reply,
        };
        self.ask(index, ANSWER_WITHIN, command, &answer).map(drop)
    }

    fn negotiated(&self, features: u64) -> io::Result<()> {
        self.parts.negotiated(features)
    }

    fn bell(&self) -> Option<RawFd> {
        Some(self.blocking.bell())
    }

    fn blocking(&self) -> Option<BlockingFd> {
        self.blocking.find()
    }

    fn session_over(&self) -> Option<BlockingFd> {
        self.blocking.forget()
    }
}
