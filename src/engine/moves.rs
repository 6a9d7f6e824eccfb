//! A disk's vrings go from one worker to another while their driver uses them.
//!
//! The worker that has a vring takes no new chain, finishes what only its own io_uring can finish,
//! and gives the whole endpoint back; the other worker takes it over as it is. Its place in the
//! ring, and requests that wait (for space, for a limit, to be told), go with it; nothing is asked
//! of the front-end, and nothing is built anew. See docs/decisions/0014.
//!
//! All this is done on the thread of the disk's session, between two messages of its front-end, so
//! that nobody else starts or stops a vring meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::bounded;

use super::build::{EngineOptions, Parts};
use super::endpoint::Endpoint;
use super::handle::{ANSWER_WITHIN, DeviceHandle, Place, timeout};
use super::mailbox::{Command, Leave, NotStarted, Stopped};
use super::placement::{worker_of, workers_of};
use super::runner::EngineError;
use super::topology::{Placement, groups};

/// How long all vrings of a disk together may take to leave. A front-end's message waits for them.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// The memory node of a vring of which nothing is known.
const NO_NODE: usize = usize::MAX;

/// What is known for moving the vrings of a device.
#[derive(Debug)]
pub(super) struct Moves {
    /// Number of the device.
    number: usize,
    placement: Placement,
    /// By worker: whether it may serve the device. Written by the main thread.
    allowed: Vec<AtomicBool>,
    /// By vring: the node of its memory.
    nodes: Vec<AtomicUsize>,
    /// By vring: a stop of it did not end in time. It goes nowhere until its worker has let it go.
    lost: Vec<AtomicBool>,
    done: AtomicU64,
}

impl Moves {
    pub(super) fn new(
        number: usize,
        cores: &[usize],
        vrings: usize,
        options: &EngineOptions,
    ) -> Moves {
        let moves = Moves {
            number,
            placement: options.placement,
            allowed: options
                .cores
                .iter()
                .map(|_| AtomicBool::default())
                .collect(),
            nodes: (0..vrings).map(|_| AtomicUsize::new(NO_NODE)).collect(),
            lost: (0..vrings).map(|_| AtomicBool::default()).collect(),
            done: AtomicU64::new(0),
        };
        moves.allow(&workers_of(cores, &options.cores));
        moves
    }

    fn allow(&self, workers: &[usize]) {
        for (worker, allowed) in self.allowed.iter().enumerate() {
            allowed.store(workers.contains(&worker), Ordering::Relaxed);
        }
    }

    /// Vrings that went to another worker so far.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// A worker has a vring that it was told to stop, or no longer.
    pub(super) fn lost(&self, index: u16, lost: bool) {
        if let Some(flag) = self.lost.get(usize::from(index)) {
            flag.store(lost, Ordering::Relaxed);
        }
    }

    fn is_lost(&self, at: usize) -> bool {
        self.lost[at].load(Ordering::Relaxed)
    }
}

impl DeviceHandle {
    /// From now on the workers on `cores` may serve this disk: those that have none are left out,
    /// and when none is left all may. Its session's thread does the rest, in
    /// [`DeviceHandle::settle`].
    pub fn allow(&self, cores: &[usize]) {
        self.moves.allow(&workers_of(cores, &self.cores));
    }

    /// The worker of a disk's vring whose memory is on `node`.
    pub(super) fn choose_worker(&self, at: usize, node: Option<usize>) -> usize {
        self.moves.nodes[at].store(node.unwrap_or(NO_NODE), Ordering::Relaxed);
        match self.moves.is_lost(at) {
            true => self.group[at].load(Ordering::Relaxed),
            false => self.wanted(at),
        }
    }

    fn wanted(&self, at: usize) -> usize {
        let moves = &self.moves;
        let is_allowed = |worker: &usize| moves.allowed[*worker].load(Ordering::Relaxed);
        let workers: Vec<_> = (0..moves.allowed.len()).filter(is_allowed).collect();
        let node = Some(moves.nodes[at].load(Ordering::Relaxed)).filter(|node| *node != NO_NODE);
        let groups = groups(moves.placement, &workers, |worker| {
            (self.topology.of_core)(self.cores[worker])
        });
        let near = groups.iter().find(|(of, _)| *of == node);
        let unit = u16::try_from(at).unwrap_or(u16::MAX);
        match near.or(groups.first()) {
            Some((_, workers)) if !workers.is_empty() => worker_of(moves.number, unit, workers),
            // The main thread is changing them; it asks again.
            _ => self.group[at].load(Ordering::Relaxed),
        }
    }

    /// Moves this disk's running vrings to the workers that they should be at, and says where they
    /// are. One that can't leave in time, because its requests take longer, stays where it is.
    pub fn settle(&self) {
        if !matches!(self.parts, Parts::Blk(..)) {
            return;
        }
        let deadline = Instant::now() + LEAVE_WITHIN;
        let mut moved = 0;
        for at in 0..self.group.len() {
            let runs = self.started[at].load(Ordering::Relaxed) && !self.moves.is_lost(at);
            let to = self.wanted(at);
            if !runs || to == self.group[at].load(Ordering::Relaxed) {
                continue;
            }
            match self.relocate(at, to, deadline) {
                Ok(()) => moved += 1,
                Err(error) => {
                    let core = self.cores[to];
                    tracing::warn!("{}: not moved to core {core}: {error}", self.name());
                    if Instant::now() >= deadline {
                        break;
                    }
                }
            }
        }
        if moved > 0 {
            self.moves.done.fetch_add(moved, Ordering::Relaxed);
            let runs = |at: &usize| self.started[*at].load(Ordering::Relaxed);
            let core = |at: usize| self.cores[self.group[at].load(Ordering::Relaxed)];
            let cores: Vec<_> = (0..self.group.len()).filter(runs).map(core).collect();
            let name = self.name();
            tracing::info!("{name}: {moved} vrings moved: they are served on cores {cores:?}");
        }
    }

    fn relocate(&self, at: usize, to: usize, deadline: Instant) -> Result<(), EngineError> {
        let index = u16::try_from(at).unwrap_or(u16::MAX);
        let old = &self.places[self.group[at].load(Ordering::Relaxed)][at];
        let new = &self.places[to][at];
        let Stopped {
            endpoint, paused, ..
        } = self.leave(index, old, deadline)?;
        let size = old.size.load(Ordering::Relaxed);
        new.size.store(size, Ordering::Relaxed);
        let Err((error, endpoint)) = self.enter(index, new, endpoint, paused) else {
            self.group[at].store(to, Ordering::Relaxed);
            return Ok(());
        };
        // Back to where it came from.
        let back = endpoint.map(|endpoint| self.enter(index, old, endpoint, paused));
        if !matches!(back, Some(Ok(()))) {
            tracing::error!("{} vring {index}: served by nobody any more", self.name());
            self.started[at].store(false, Ordering::Relaxed);
        }
        Err(error)
    }

    /// Has a worker give a vring back as it is. On an error it goes on serving it.
    fn leave(&self, index: u16, old: &Place, deadline: Instant) -> Result<Stopped, EngineError> {
        let slot = old.slot;
        let (reply, answer) = bounded(1);
        let how = Leave::Movable;
        let within = deadline.saturating_duration_since(Instant::now());
        let stopped = self.ask(index, within, Command::Stop { slot, how, reply }, &answer);
        if !matches!(stopped, Err(EngineError::Timeout { .. })) {
            return stopped;
        }
        let (reply, stays) = bounded(1);
        let stays = self.ask(index, ANSWER_WITHIN, Command::Stay { slot, reply }, &stays)?;
        let in_flight = u32::try_from(old.counters.in_flight.get()).unwrap_or(u32::MAX);
        let waited_ms = u64::try_from(LEAVE_WITHIN.as_millis()).unwrap_or(u64::MAX);
        let draining = EngineError::Draining {
            index,
            in_flight,
            waited_ms,
        };
        match stays {
            true => Err(draining),
            // It was on its way.
            false => answer.try_recv().map_err(|_| draining),
        }
    }

    /// Gives a vring to a worker, or back to the caller.
    pub(super) fn enter(
        &self,
        index: u16,
        place: &Place,
        endpoint: Endpoint,
        paused: bool,
    ) -> Result<(), (EngineError, Option<Endpoint>)> {
        let (reply, answer) = bounded(1);
        let deadline = Instant::now() + ANSWER_WITHIN;
        let command = Command::Start {
            slot: place.slot,
            endpoint,
            paused,
            reply,
        };
        let late = timeout(index, ANSWER_WITHIN);
        match place.mailbox.send(command, deadline) {
            Err(Command::Start { endpoint, .. }) => return Err((late, Some(endpoint))),
            Err(_) => return Err((late, None)),
            Ok(()) => {}
        }
        match answer.recv_deadline(deadline) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(NotStarted { error, endpoint })) => {
                let source = error;
                Err((EngineError::System { index, source }, Some(endpoint)))
            }
            Err(_) => Err((late, None)),
        }
    }

    fn name(&self) -> String {
        let model = self.parts.model();
        format!("{} {}", model.kind(), model.name())
    }
}

#[cfg(test)]
mod tests;
