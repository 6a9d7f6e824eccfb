//! `Worker`: one thread on one core, and everything it owns.
//!
//! The loop is four steps: obey the mailbox, let every link and disk move one burst, enter the
//! io_uring once, and decide whether to sleep. It takes no lock and allocates nothing; a message
//! from control may do both.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::host::net::FrameBurst;
use crate::memory::{SEGMENTS_MAX, Segments};
use crate::sync::Counter;
use crate::sys::cpu;
use crate::sys::disk::IoOptions;
use crate::sys::patience::never_wait;
use crate::sys::uring::Uring;

use super::endpoint::{Endpoint, GuestDisk, GuestSink, GuestSource};
use super::fabric::{Inbound, Running};
use super::idle::{Idle, IdlePolicy, Turn};
use super::link::{HostPorts, Link};
use super::mailbox::{Command, Leave, Mailbox, NotStarted, Stopped};
use park::raw;

/// Requests that a disk queue takes in one turn, so that none starves the others.
const DISK_BUDGET: usize = 64;
/// What epoll says of the io_uring; of everything else it says 0.
const URING_DONE: u64 = 1;
/// How long the end of a worker waits for operations that nobody waited for before.
const QUIESCE_WITHIN: Duration = Duration::from_secs(5);

/// What is counted per worker. One writer: its thread.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    /// Turns of the loop that moved something.
    pub busy_turns: Counter,
    /// Turns that moved nothing.
    pub empty_turns: Counter,
    /// Times that the worker slept.
    pub parks: Counter,
    /// Sleeps that were bounded because a vring has no kick fd or too few buffers.
    pub bounded_parks: Counter,
}

/// What a worker owns once and lends to whatever it polls.
#[derive(Debug)]
pub(crate) struct WorkerCx {
    /// The one io_uring; there when a disk of this worker needs it.
    pub(crate) uring: Option<Uring>,
    /// Scratch for one chain at a time.
    pub(crate) scratch: Segments,
    /// Old memory tables go here to be unmapped off this core.
    pub(crate) retired: Sender<super::mailbox::Retired>,
    /// Who wants to wake the worker does it here.
    pub(crate) mailbox: Arc<Mailbox>,
}

/// A vring's place.
#[derive(Debug, Default)]
struct Slot {
    endpoint: Option<Endpoint>,
    /// When it came.
    since: Option<Instant>,
    paused: bool,
    /// When what a guest sends on it while it is paused begins to be dropped, until it has.
    grace: Option<Instant>,
    /// What it is stopped for, and who waits for that.
    stopping: Option<(Leave, Sender<Stopped>)>,
    /// Whether it runs, for workers that send to it.
    running: Running,
}

impl Slot {
    fn runs(&self) -> bool {
        !self.paused && self.stopping.is_none()
    }

    fn is_running(&self) -> bool {
        self.endpoint.is_some() && self.runs()
    }

    /// Disables (`true`) or enables it.
    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        self.grace = paused.then(|| Instant::now() + disabled::GRACE);
        self.tell();
    }

    /// Tells other workers whether it runs, after something has changed.
    fn tell(&self) {
        self.running.set(self.is_running());
    }
}

/// The vrings of a worker.
#[derive(Debug)]
pub(crate) struct Slots(Vec<Slot>);

impl Slots {
    #[inline]
    fn running(&mut self, slot: usize) -> Option<&mut Endpoint> {
        let slot = &mut self.0[slot];
        if !slot.runs() {
            return None;
        }
        slot.endpoint.as_mut()
    }

    /// The vring in `slot` as a source of frames, even if it is paused or about to stop.
    pub(crate) fn source_in_any_state(&mut self, slot: usize) -> Option<&mut dyn GuestSource> {
        match &mut self.0[slot].endpoint {
            Some(Endpoint::Source(source)) => Some(source.as_mut()),
            _ => None,
        }
    }

    /// Two running vrings at once.
    #[inline]
    pub(crate) fn pair(&mut self, a: usize, b: usize) -> Option<(&mut Endpoint, &mut Endpoint)> {
        let [a, b] = self.0.get_disjoint_mut([a, b]).ok()?;
        if !a.runs() || !b.runs() {
            return None;
        }
        Some((a.endpoint.as_mut()?, b.endpoint.as_mut()?))
    }

    /// Whether the vring in `slot` is there and runs.
    pub(crate) fn is_running(&self, slot: usize) -> bool {
        self.0[slot].is_running()
    }

    /// Whether the vring in `slot` has come within `span`.
    pub(crate) fn is_new(&self, slot: usize, span: Duration) -> bool {
        let since = self.0[slot].since;
        since.is_some_and(|since| since.elapsed() < span)
    }

    /// Whether there is a vring in `slot`, even if it is paused or about to stop.
    pub(crate) fn is_there(&self, slot: usize) -> bool {
        self.0[slot].endpoint.is_some()
    }

    /// The running vring in `slot` as a source of frames.
    #[inline]
    pub(crate) fn source(&mut self, slot: usize) -> Option<&mut (dyn GuestSource + 'static)> {
        match self.running(slot) {
            Some(Endpoint::Source(source)) => Some(source.as_mut()),
            _ => None,
        }
    }

    /// The running vring in `slot` as a sink of frames.
    #[inline]
    pub(crate) fn sink(&mut self, slot: usize) -> Option<&mut (dyn GuestSink + 'static)> {
        match self.running(slot) {
            Some(Endpoint::Sink(sink)) => Some(sink.as_mut()),
            _ => None,
        }
    }

    #[inline]
    fn disk(&mut self, slot: usize) -> Option<&mut (dyn GuestDisk + 'static)> {
        let slot = &mut self.0[slot];
        match &mut slot.endpoint {
            Some(Endpoint::Disk(disk)) => Some(disk.as_mut()),
            _ => None,
        }
    }
}

/// Which io_uring a worker needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UringNeed {
    /// None.
    #[default]
    Nothing,
    /// An ordinary one.
    Ring,
    /// One with a thread of the kernel that takes what is queued.
    WithThread,
}

impl UringNeed {
    /// Of a disk that asks for these.
    pub(crate) fn of(io: IoOptions) -> UringNeed {
        match io.sqpoll {
            true => UringNeed::WithThread,
            false => UringNeed::Ring,
        }
    }

    /// The ring, which `epoll` is told of.
    fn make(self, epoll: &Epoll) -> io::Result<Option<Uring>> {
        let ring = match self {
            UringNeed::Nothing => return Ok(None),
            UringNeed::Ring => Uring::new()?,
            UringNeed::WithThread => Uring::with_thread()?,
        };
        let done = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, URING_DONE);
        epoll.ctl(ControlOperation::Add, raw(&ring), done)?;
        Ok(Some(ring))
    }
}

/// How a worker is made.
#[derive(Debug)]
pub(crate) struct WorkerConfig {
    pub(crate) core: usize,
    pub(crate) policy: IdlePolicy,
    /// Places for vrings, with what tells other workers of each.
    pub(crate) slots: Vec<Running>,
    pub(crate) links: Vec<Link>,
    /// From gates on other workers.
    pub(crate) inbounds: Vec<Inbound>,
    pub(crate) ports: HostPorts,
    /// What the disks of this worker do their I/O through.
    pub(crate) uring: UringNeed,
    pub(crate) retired: Sender<super::mailbox::Retired>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) counters: Arc<WorkerCounters>,
}

/// One pinned thread.
#[derive(Debug)]
pub(crate) struct Worker {
    slots: Slots,
    links: Vec<Link>,
    /// Those that have a turn: most queue pairs of most ports are never used.
    live: Vec<usize>,
    inbounds: Vec<Inbound>,
    ports: HostPorts,
    /// Slots with a vring.
    started: Vec<usize>,
    /// Slots with a disk, so that a turn does not look at the others.
    disks: Vec<usize>,
    /// Slots with a paused vring on which a guest sends.
    disabled: Vec<usize>,
    /// Turns until they are looked at.
    discard_in: u32,
    /// Slots whose vring puts calls to its driver off.
    putting_off: Vec<usize>,
    /// Slots whose vring has no kick fd.
    kickless: usize,
    cx: WorkerCx,
    burst: FrameBurst,
    idle: Idle,
    epoll: Epoll,
    /// The host's interfaces are in it: see [`hosts`].
    hosts_watched: bool,
    /// Turns since the last sleep, up to [`hosts::TURNS_WATCHED`].
    turns_awake: u32,
    /// Ends a sleep when a disk must be polled: epoll counts in milliseconds.
    alarm: TimerFd,
    counters: Arc<WorkerCounters>,
    /// Some slot waits to be stopped.
    stopping: bool,
    exit: bool,
}

impl Worker {
    /// Starts the thread; returns when it is pinned and ready, or failed to be.
    ///
    /// # Errors
    /// The core can't be used, or the kernel refused epoll or io_uring.
    pub(crate) fn spawn(config: WorkerConfig) -> io::Result<JoinHandle<()>> {
        let (ready, started) = crossbeam::channel::bounded(1);
        let name = format!("worker-{}", config.core);
        let run = move || match Worker::new(config) {
            Ok(mut worker) => {
                let _ = ready.send(Ok(()));
                worker.run();
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        match started.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker ended before it was ready")),
        }
    }

    fn new(config: WorkerConfig) -> io::Result<Worker> {
        never_wait();
        cpu::pin_to_core(config.core).map_err(io::Error::other)?;
        config.mailbox.telling().begin()?;
        let epoll = Epoll::new()?;
        watch(&epoll, config.mailbox.wake_fd(), EventSet::EDGE_TRIGGERED)?;
        let alarm = TimerFd::new()?;
        watch(&epoll, &alarm, EventSet::EDGE_TRIGGERED)?;
        let uring = config.uring.make(&epoll)?;
        let slot = |running| Slot {
            running,
            ..Slot::default()
        };
        let slots = config.slots.into_iter().map(slot).collect();
        let mut worker = Worker {
            slots: Slots(slots),
            live: Vec::with_capacity(config.links.len()),
            links: config.links,
            inbounds: config.inbounds,
            ports: config.ports,
            started: Vec::new(),
            disks: Vec::new(),
            disabled: Vec::new(),
            discard_in: 0,
            putting_off: Vec::new(),
            kickless: 0,
            cx: WorkerCx {
                uring,
                scratch: Segments::with_capacity(SEGMENTS_MAX),
                retired: config.retired,
                mailbox: config.mailbox,
            },
            burst: FrameBurst::new(),
            idle: Idle::new(config.policy),
            epoll,
            hosts_watched: false,
            turns_awake: 0,
            alarm,
            counters: config.counters,
            stopping: false,
            exit: false,
        };
        worker.find_live();
        Ok(worker)
    }

    fn run(&mut self) {
        while !self.exit {
            if !self.cx.mailbox.is_empty() {
                self.obey();
            }
            let turn = self.turn();
            // Only with work: who polls for a while before it sleeps is soon to watch them again,
            // and what waits there for a guest would end that sleep at once.
            if self.hosts_watched && turn.work > 0 {
                self.stay_awake();
            }
            if self.stopping {
                self.answer_stops();
            }
            // The wake-up of the last command is used up: who sleeps on it sleeps for good.
            if self.idle.after(turn) && !self.exit {
                self.park();
            }
        }
        self.quiesce();
    }

    /// Before the vrings go, and guest memory with them, the kernel must be done with it.
    fn quiesce(&mut self) {
        if let Some(mut ring) = self.cx.uring.take()
            && !ring.quiesce(QUIESCE_WITHIN)
        {
            // A dead disk: memory stays mapped until the process ends, which it is about to.
            core::mem::forget(core::mem::take(&mut self.slots.0));
            core::mem::forget(ring);
        }
    }

    /// Every link and disk moves one burst.
    #[inline]
    fn turn(&mut self) -> Turn {
        let mut work = 0;
        for &at in &self.live {
            work += self.links[at].poll(&mut self.slots, &mut self.ports, &mut self.burst);
        }
        for inbound in &mut self.inbounds {
            work += inbound.poll(&mut self.slots);
        }
        for &slot in &self.disks {
            let draining = self.slots.0[slot].stopping.is_some();
            let paused = self.slots.0[slot].paused;
            if let Some(disk) = self.slots.disk(slot) {
                // A disabled or stopping queue takes nothing new, but what it took must finish.
                let budget = if draining || paused { 0 } else { DISK_BUDGET };
                work += disk.poll(&mut self.cx, budget);
            }
        }
        if !self.disabled.is_empty() {
            work += self.discard_disabled();
        }
        let (mut finished, mut waits) = (0, false);
        if let Some(uring) = &mut self.cx.uring {
            finished = uring.enter();
            waits = uring.is_waiting();
            work += finished;
        }
        self.flush_calls(false);
        let counter = if work > 0 {
            &self.counters.busy_turns
        } else {
            &self.counters.empty_turns
        };
        counter.add(1);
        Turn {
            work,
            finished,
            waits,
        }
    }

    /// Makes the calls that are due, or all that are owed with `now`.
    #[inline]
    fn flush_calls(&mut self, now: bool) {
        for &slot in &self.putting_off {
            if let Some(endpoint) = &mut self.slots.0[slot].endpoint {
                endpoint.vring().flush_call(now);
            }
        }
    }

    /// Finds out which links have a turn, after vrings came, went, or were paused.
    fn find_live(&mut self) {
        self.find_disabled();
        self.let_hosts_be();
        self.live.clear();
        let links = self.links.iter().enumerate();
        let live = links.filter(|(_, link)| link.is_live(&self.slots));
        self.live.extend(live.map(|(at, _)| at));
    }

    fn obey(&mut self) {
        while let Some(command) = self.cx.mailbox.receive() {
            self.idle.woke();
            match command {
                Command::Start {
                    slot,
                    endpoint,
                    paused,
                    reply,
                } => {
                    let _ = reply.try_send(self.start(slot, endpoint, paused));
                }
                Command::Stop { slot, how, reply } => {
                    self.slots.0[slot].stopping = Some((how, reply));
                    self.slots.0[slot].tell();
                    self.stopping = true;
                }
                Command::Stay { slot, reply } => {
                    let slot = &mut self.slots.0[slot];
                    let stays = slot.stopping.take().is_some() && slot.endpoint.is_some();
                    slot.tell();
                    let _ = reply.try_send(stays);
                }
                Command::Pause {
                    slot,
                    paused,
                    reply,
                } => {
                    self.slots.0[slot].pause(paused);
                    let _ = reply.try_send(());
                }
                Command::Call { slot, fds, reply } => {
                    let old = match &mut self.slots.0[slot].endpoint {
                        Some(endpoint) => endpoint.vring().set_fds(fds),
                        None => fds,
                    };
                    let _ = reply.try_send(old);
                }
                Command::Swap {
                    slot,
                    ram,
                    areas,
                    reply,
                } => {
                    let old = match &mut self.slots.0[slot].endpoint {
                        Some(endpoint) => endpoint.vring().swap(&mut self.cx, ram, areas),
                        None => Some(super::mailbox::Retired { ram, areas }),
                    };
                    let _ = reply.try_send(old);
                }
                Command::Exit => self.exit = true,
            }
        }
        self.find_live();
    }

    fn start(
        &mut self,
        slot: usize,
        mut endpoint: Endpoint,
        paused: bool,
    ) -> Result<(), NotStarted> {
        if let Err(error) = self.make_room(slot, &mut endpoint) {
            return Err(NotStarted { error, endpoint });
        }
        if matches!(endpoint, Endpoint::Disk(_)) {
            self.disks.push(slot);
        }
        if endpoint.vring().puts_calls_off() {
            self.putting_off.push(slot);
        }
        self.started.push(slot);
        let slot = &mut self.slots.0[slot];
        slot.endpoint = Some(endpoint);
        slot.since = Some(Instant::now());
        slot.pause(paused);
        Ok(())
    }

    /// What a vring needs of this worker; nothing, when that fails.
    fn make_room(&mut self, slot: usize, endpoint: &mut Endpoint) -> io::Result<()> {
        if self.slots.0[slot].endpoint.is_some() {
            return Err(io::Error::other(
                "the vring before it is still being stopped",
            ));
        }
        let vring = endpoint.vring();
        if self.cx.uring.is_none() {
            self.cx.uring = vring.uring().make(&self.epoll)?;
        }
        vring.attach(&mut self.cx)?;
        let watched = match vring.kick() {
            Some(kick) => watch(&self.epoll, kick, EventSet::EDGE_TRIGGERED),
            None => {
                self.kickless += 1;
                Ok(())
            }
        };
        if watched.is_err() {
            vring.detach(&mut self.cx);
        }
        watched
    }

    /// Gives back every stopping vring that holds nothing any more.
    fn answer_stops(&mut self) {
        self.stopping = false;
        for index in 0..self.slots.0.len() {
            let slot = &mut self.slots.0[index];
            let (Some((how, _)), Some(endpoint)) = (&slot.stopping, &mut slot.endpoint) else {
                // Nobody is there to be stopped: the sender learns it from the closed channel.
                slot.stopping = None;
                continue;
            };
            let leaves = match how {
                Leave::Drained => endpoint.vring().drain(&mut self.cx),
                Leave::Movable => endpoint.vring().is_movable(&mut self.cx),
            };
            if !leaves {
                self.stopping = true;
                continue;
            }
            let (stopping, endpoint) = (slot.stopping.take(), slot.endpoint.take());
            let paused = core::mem::take(&mut slot.paused);
            slot.tell();
            if let (Some((_, reply)), Some(endpoint)) = (stopping, endpoint) {
                self.finish_stop(index, endpoint, paused, &reply);
            }
        }
    }

    fn finish_stop(
        &mut self,
        slot: usize,
        mut endpoint: Endpoint,
        paused: bool,
        reply: &Sender<Stopped>,
    ) {
        endpoint.vring().detach(&mut self.cx);
        match endpoint.vring().kick() {
            Some(kick) => {
                let _ = self
                    .epoll
                    .ctl(ControlOperation::Delete, raw(kick), EpollEvent::default());
            }
            None => self.kickless -= 1,
        }
        self.started.retain(|&other| other != slot);
        self.find_live();
        self.disks.retain(|&disk| disk != slot);
        self.putting_off.retain(|&other| other != slot);
        endpoint.vring().flush_call(true);
        let base = endpoint.vring().base();
        let stopped = Stopped {
            base,
            endpoint,
            paused,
        };
        let _ = reply.try_send(stopped);
    }
}

/// Wakes the worker when `fd` becomes readable.
fn watch(epoll: &Epoll, fd: &impl std::os::fd::AsRawFd, how: EventSet) -> io::Result<()> {
    let event = EpollEvent::new(EventSet::IN | how, 0);
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
}

mod disabled;
mod hosts;
mod park;
#[cfg(test)]
mod tests;
