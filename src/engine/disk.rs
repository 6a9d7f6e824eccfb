//! `DiskQueue`: a request queue of a disk, with the host side that serves it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::device::blk::{BlkCounters, BlkHandler};
use crate::host::blk::BlkIo;
use crate::host::crypt::Crypt;
use crate::host::fault::FaultDisk;
use crate::host::null::NullDisk;
use crate::host::qcow2::{Qcow2Disk, Waker};
use crate::host::ram::RamDisk;
use crate::host::uring::UringDisk;
use crate::memory::GuestRam;
use crate::ring::{Areas, RingFault, RingFormat, Virtqueue};
use crate::sys::uring::Uring;

use super::backing::Encryption;
use super::endpoint::{GuestDisk, VringEndpoint};
use super::link::Armed;
use super::mailbox::{CallFds, Mailbox, Retired};
use super::started::{Vring, VringCounters};
use super::worker::{UringNeed, WorkerCx};

/// Requests in flight at most per queue, for the queues of completions.
pub(super) const IN_FLIGHT_MAX: u16 = 512;

/// Where the blocks of this queue are.
#[derive(Debug)]
pub(super) enum HostDisk {
    /// A file or block device, through the worker's io_uring.
    Uring(UringDisk),
    /// The same, with ciphertext on it.
    Encrypted(EncryptedDisk),
    /// A qcow2 image, through the worker's io_uring and a thread of its own.
    Qcow2(Box<Qcow2Disk>),
    /// Memory shared by all queues of the disk.
    Ram(RamDisk),
    /// Nowhere.
    Null(NullDisk),
}

impl HostDisk {
    fn attach(&mut self, ring: Option<&mut Uring>, worker: &Arc<Mailbox>) -> io::Result<()> {
        match (self, ring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.attach(ring, IN_FLIGHT_MAX.into()),
            (HostDisk::Encrypted(disk), Some(ring)) => disk.attach(ring),
            (HostDisk::Qcow2(disk), Some(ring)) => {
                let worker = Arc::clone(worker);
                disk.wakes(Waker(Arc::new(move || worker.nudge())));
                disk.attach(ring, IN_FLIGHT_MAX.into())
            }
            (HostDisk::Uring(_) | HostDisk::Encrypted(_) | HostDisk::Qcow2(_), None) => {
                Err(io::Error::other("the worker has no io_uring"))
            }
            (HostDisk::Ram(_) | HostDisk::Null(_), _) => Ok(()),
        }
    }

    fn detach(&mut self, ring: Option<&mut Uring>) {
        match (self, ring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.detach(ring),
            (HostDisk::Encrypted(it), Some(ring)) => it.disk.detach(ring),
            (HostDisk::Qcow2(disk), Some(ring)) => disk.detach(ring),
            _ => {}
        }
    }

    /// Operations that only the worker's ring can finish.
    fn in_ring(&self, ring: Option<&Uring>) -> usize {
        match (self, ring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.in_ring(ring),
            (HostDisk::Encrypted(it), Some(ring)) => it.disk.in_ring(ring),
            // What its thread has goes with us.
            (HostDisk::Qcow2(disk), Some(ring)) => disk.file().in_ring(ring),
            _ => 0,
        }
    }

    /// Which ring it needs.
    fn need(&self) -> UringNeed {
        self.file()
            .map_or(UringNeed::Nothing, |disk| UringNeed::of(disk.io()))
    }

    /// Registers guest memory with the ring, where that is asked for.
    fn pin(&self, ring: Option<&mut Uring>, ram: &GuestRam) {
        match (self, ring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.pin(ring, ram),
            (HostDisk::Qcow2(disk), Some(ring)) => disk.pin(ring, ram),
            _ => {}
        }
    }

    /// Takes guest memory out of the ring again, before it is unmapped.
    fn unpin(&self, ring: Option<&mut Uring>, ram: &GuestRam) {
        match (self, ring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.unpin(ring, ram),
            (HostDisk::Qcow2(disk), Some(ring)) => disk.unpin(ring, ram),
            _ => {}
        }
    }

    /// Before a driver is told what is done.
    fn settle(&mut self) {
        match self {
            HostDisk::Ram(disk) => disk.settle(),
            HostDisk::Uring(disk) => disk.settle(),
            HostDisk::Encrypted(it) => it.disk.settle(),
            HostDisk::Qcow2(_) | HostDisk::Null(_) => {}
        }
    }

    /// Whether something is done that nothing but the next turn finds.
    fn has_done(&mut self) -> bool {
        match self {
            HostDisk::Uring(disk) => disk.has_done(),
            HostDisk::Qcow2(disk) => disk.has_done(),
            HostDisk::Encrypted(it) => it.disk.has_done(),
            // Done when reaped, which wakes nobody.
            HostDisk::Ram(disk) => disk.in_flight() > 0,
            HostDisk::Null(disk) => disk.in_flight() > 0,
        }
    }

    /// Its file, where it has one.
    fn file(&self) -> Option<&UringDisk> {
        match self {
            HostDisk::Uring(disk) => Some(disk),
            HostDisk::Encrypted(it) => Some(&it.disk),
            HostDisk::Qcow2(disk) => Some(disk.file()),
            HostDisk::Ram(_) | HostDisk::Null(_) => None,
        }
    }

    /// Operations that had unaligned buffers, and those that were done at once.
    fn counted(&self) -> (u64, u64) {
        let counted = |disk: &UringDisk| (disk.unaligned(), disk.at_once());
        self.file().map_or((0, 0), counted)
    }
}

/// A disk with ciphertext on it.
#[derive(Debug)]
pub(super) struct EncryptedDisk {
    disk: UringDisk,
    how: Encryption,
    /// There once it was attached.
    crypt: Option<Box<Crypt>>,
}

impl EncryptedDisk {
    pub(super) fn new(disk: UringDisk, how: Encryption) -> EncryptedDisk {
        let crypt = None;
        EncryptedDisk { disk, how, crypt }
    }

    fn attach(&mut self, ring: &mut Uring) -> io::Result<()> {
        if self.crypt.is_none() {
            let crypt = Crypt::new(&self.how.key, self.how.sector, IN_FLIGHT_MAX)?;
            self.crypt = Some(Box::new(crypt));
        }
        self.disk.attach(ring, IN_FLIGHT_MAX.into())
    }
}

/// Requests that a disk which needs no device takes in a turn: half of those that are there, since
/// all are answered at the end of it and the driver needs something to do while we do the next; but
/// these at least.
const AT_ONCE_MIN: usize = 16;

/// Requests that are looked for at most, in one of so many turns: what is looked at is taken away
/// from the driver, which may be writing there.
const AT_ONCE_LOOK: u16 = 128;
const AT_ONCE_TURNS: u32 = 64;

/// Descriptors of most requests, unless they have a table: header, data, status.
const REQUEST_DESCS: u16 = 3;

/// How many requests a disk that needs no device takes in a turn.
#[derive(Debug)]
struct AtOnce {
    budget: usize,
    /// Turns until the ring is looked at.
    rest: u32,
}

impl AtOnce {
    const NEW: AtOnce = AtOnce {
        budget: AT_ONCE_MIN,
        rest: 0,
    };

    #[inline]
    fn budget<F: RingFormat>(&mut self, vq: &mut Virtqueue<F>) -> usize {
        if self.rest == 0 {
            let each = if F::PACKED { REQUEST_DESCS } else { 1 };
            let there = vq.backlog(AT_ONCE_LOOK * each) / each;
            self.budget = usize::from(there / 2).max(AT_ONCE_MIN);
            self.rest = AT_ONCE_TURNS;
        }
        self.budget
    }

    /// A turn has begun and completed `work` requests: after few, most of the ring is the driver's.
    #[inline]
    fn took(&mut self, work: usize) {
        if work >= 2 * AT_ONCE_MIN {
            self.rest = self.rest.saturating_sub(1);
        }
    }
}

/// An old memory table that requests in flight still point into.
#[derive(Debug)]
struct OldTable {
    /// The first table after it: it can go when nothing older than that is in flight.
    until: u32,
    retired: Retired,
}

/// A request queue.
#[derive(Debug)]
pub(super) struct DiskQueue<F: RingFormat> {
    vring: Vring<F>,
    handler: BlkHandler,
    host: HostDisk,
    /// What goes wrong between the two.
    faults: FaultDisk,
    counters: Arc<VringCounters>,
    blk_counters: Arc<BlkCounters>,
    old_tables: Vec<OldTable>,
    at_once: AtOnce,
}

impl<F: RingFormat> DiskQueue<F> {
    pub(super) fn new(
        vring: Vring<F>,
        handler: BlkHandler,
        host: HostDisk,
        faults: FaultDisk,
        counters: Arc<VringCounters>,
        blk_counters: Arc<BlkCounters>,
    ) -> DiskQueue<F> {
        let old_tables = Vec::new();
        DiskQueue {
            vring,
            handler,
            host,
            faults,
            counters,
            blk_counters,
            old_tables,
            at_once: AtOnce::NEW,
        }
    }

    fn run(&mut self, cx: &mut WorkerCx, budget: usize) -> Result<usize, RingFault> {
        let before = self.host.counted();
        let work = if self.faults.is_active() {
            self.run_faulty(cx, budget)
        } else {
            self.run_plain(cx, budget)
        };
        let after = self.host.counted();
        if after != before {
            self.blk_counters.unaligned.add(after.0 - before.0);
            self.blk_counters.at_once.add(after.1 - before.1);
        }
        work
    }

    #[inline]
    fn run_plain(&mut self, cx: &mut WorkerCx, budget: usize) -> Result<usize, RingFault> {
        let (vq, scratch) = (&mut self.vring.vq, &mut cx.scratch);
        let at_once = &mut self.at_once;
        match (&mut self.host, &mut cx.uring) {
            (HostDisk::Uring(disk), Some(ring)) => {
                let few = match disk.is_in_memory() {
                    true => budget.min(at_once.budget(vq)),
                    false => budget,
                };
                self.handler.poll(vq, &mut disk.lend(ring), scratch, few)
            }
            (HostDisk::Encrypted(it), Some(ring)) => match &mut it.crypt {
                Some(crypt) => {
                    let mut disk = crypt.over(it.disk.lend(ring));
                    self.handler.poll(vq, &mut disk, scratch, budget)
                }
                None => Ok(0),
            },
            (HostDisk::Qcow2(disk), Some(ring)) => {
                self.handler.poll(vq, &mut disk.lend(ring), scratch, budget)
            }
            // `attach` refuses a disk that needs a ring where there is none.
            (HostDisk::Uring(_) | HostDisk::Encrypted(_) | HostDisk::Qcow2(_), None) => Ok(0),
            (HostDisk::Ram(disk), _) => {
                let few = budget.min(at_once.budget(vq));
                self.handler.poll(vq, disk, scratch, few)
            }
            (HostDisk::Null(disk), _) => {
                let few = budget.min(at_once.budget(vq));
                self.handler.poll(vq, disk, scratch, few)
            }
        }
    }

    #[cold]
    fn run_faulty(&mut self, cx: &mut WorkerCx, budget: usize) -> Result<usize, RingFault> {
        let (vq, scratch) = (&mut self.vring.vq, &mut cx.scratch);
        let faults = &mut self.faults;
        let before = faults.injected();
        let mut poll = |disk: &mut dyn BlkIo| {
            let mut disk = faults.over(disk);
            self.handler.poll(vq, &mut disk, scratch, budget)
        };
        let work = match (&mut self.host, &mut cx.uring) {
            (HostDisk::Uring(disk), Some(ring)) => poll(&mut disk.lend(ring)),
            (HostDisk::Encrypted(it), Some(ring)) => match &mut it.crypt {
                Some(crypt) => poll(&mut crypt.over(it.disk.lend(ring))),
                None => Ok(0),
            },
            (HostDisk::Qcow2(disk), Some(ring)) => poll(&mut disk.lend(ring)),
            (HostDisk::Ram(disk), _) => poll(disk),
            (HostDisk::Null(disk), _) => poll(disk),
            (HostDisk::Uring(_) | HostDisk::Encrypted(_) | HostDisk::Qcow2(_), None) => Ok(0),
        };
        self.blk_counters.injected.add(faults.injected() - before);
        work
    }

    /// The memory tables that requests may point into.
    fn tables(&self) -> impl Iterator<Item = &Arc<GuestRam>> {
        let old = self.old_tables.iter().map(|table| &table.retired.ram);
        old.chain([self.vring.vq.ram()])
    }

    /// Sends tables that nothing in flight points into to be unmapped.
    #[cold]
    fn retire(&mut self, cx: &mut WorkerCx) {
        let oldest = self.handler.oldest_epoch();
        let unused = |table: &mut OldTable| {
            oldest.is_none_or(|oldest| oldest.wrapping_sub(table.until) < u32::MAX / 2)
        };
        for table in self.old_tables.extract_if(.., unused) {
            self.host.unpin(cx.uring.as_mut(), &table.retired.ram);
            // Full: unmapped here and now.
            let _ = cx.retired.try_send(table.retired);
        }
    }
}

impl<F: RingFormat> VringEndpoint for DiskQueue<F> {
    fn attach(&mut self, cx: &mut WorkerCx) -> io::Result<()> {
        self.vring.served_by(&cx.mailbox);
        self.host.attach(cx.uring.as_mut(), &cx.mailbox)?;
        for ram in self.tables() {
            self.host.pin(cx.uring.as_mut(), ram);
        }
        Ok(())
    }

    fn detach(&mut self, cx: &mut WorkerCx) {
        // Another core can't do it for us.
        self.host.settle();
        self.retire(cx);
        for ram in self.tables() {
            self.host.unpin(cx.uring.as_mut(), ram);
        }
        self.host.detach(cx.uring.as_mut());
    }

    fn kick(&self) -> Option<&EventFd> {
        self.vring.kick()
    }

    fn disarm(&mut self) {
        self.vring.set_kicks(false);
    }

    fn puts_calls_off(&self) -> bool {
        self.vring.puts_calls_off()
    }

    fn flush_call(&mut self, now: bool) {
        self.vring.flush_call(now);
    }

    fn drain(&mut self, cx: &mut WorkerCx) -> bool {
        self.handler.stop_holding();
        self.poll(cx, 0);
        self.handler.is_drained()
    }

    fn is_movable(&mut self, cx: &mut WorkerCx) -> bool {
        // What waits for space, for a limit or to be told goes with us.
        self.host.in_ring(cx.uring.as_ref()) == 0
    }

    fn uring(&self) -> UringNeed {
        self.host.need()
    }

    fn base(&self) -> u32 {
        self.vring.base()
    }

    fn set_fds(&mut self, fds: CallFds) -> CallFds {
        self.vring.set_fds(fds)
    }

    fn swap(&mut self, cx: &mut WorkerCx, ram: Arc<GuestRam>, areas: Areas) -> Option<Retired> {
        // First, so that what both tables have stays as it is.
        self.host.pin(cx.uring.as_mut(), &ram);
        let (ram, areas) = self.vring.swap(ram, areas);
        let retired = Retired { ram, areas };
        if self.handler.in_flight() == 0 {
            self.host.unpin(cx.uring.as_mut(), &retired.ram);
            return Some(retired);
        }
        // Requests in flight point into it: it goes when they are done.
        let until = self.handler.next_epoch();
        self.old_tables.push(OldTable { until, retired });
        self.retire(cx);
        None
    }
}

impl<F: RingFormat> GuestDisk for DiskQueue<F> {
    fn poll(&mut self, cx: &mut WorkerCx, budget: usize) -> usize {
        let done = self.run(cx, budget);
        let work = done.unwrap_or_else(|fault| {
            self.vring.report(fault);
            0
        });
        self.at_once.took(work);
        // What the host completed is answered on a broken ring too.
        if work > 0 || done.is_err() {
            self.host.settle();
            self.vring.publish();
            self.counters.in_flight.set(self.handler.in_flight() as u64);
            if !self.old_tables.is_empty() {
                self.retire(cx);
            }
        }
        work
    }

    fn arm(&mut self, takes: bool) -> Armed {
        // With every slot taken a completion comes first, and wakes us. A limit has a time.
        let takes = takes && self.handler.has_room();
        if self.host.has_done() || takes && self.vring.set_kicks(true) {
            return Armed::Work;
        }
        match self.faults.holds() {
            true => Armed::Bounded,
            false => Armed::Sleep,
        }
    }

    fn wait(&mut self) -> Option<Duration> {
        let due = self.handler.due();
        let look = due.map(|due| due.saturating_duration_since(Instant::now()));
        self.handler.wait().into_iter().chain(look).min()
    }
}

#[cfg(test)]
mod tests;
