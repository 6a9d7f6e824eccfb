//! `DiskQueue`: a request queue of a disk, with the host side that serves it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::blk::{BlkCounters, BlkHandler};
use crate::host::null::NullDisk;
use crate::host::ram::RamDisk;
use crate::host::uring::UringDisk;
use crate::memory::GuestRam;
use crate::ring::{Areas, RingFault, RingFormat};

use super::endpoint::{GuestDisk, VringEndpoint};
use super::link::Armed;
use super::mailbox::{CallFds, Retired};
use super::started::{Vring, VringCounters};
use super::worker::WorkerCx;

/// Requests in flight at most per queue, for the queues of completions.
pub(super) const IN_FLIGHT_MAX: usize = 512;

/// Where the blocks of this queue are.
#[derive(Debug)]
pub(super) enum HostDisk {
    /// A file or block device, through the worker's io_uring.
    Uring(UringDisk),
    /// Memory shared by all queues of the disk.
    Ram(RamDisk),
    /// Nowhere.
    Null(NullDisk),
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
    counters: Arc<VringCounters>,
    blk_counters: Arc<BlkCounters>,
    old_tables: Vec<OldTable>,
}

impl<F: RingFormat> DiskQueue<F> {
    pub(super) fn new(
        vring: Vring<F>,
        handler: BlkHandler,
        host: HostDisk,
        counters: Arc<VringCounters>,
        blk_counters: Arc<BlkCounters>,
    ) -> DiskQueue<F> {
        let old_tables = Vec::new();
        DiskQueue {
            vring,
            handler,
            host,
            counters,
            blk_counters,
            old_tables,
        }
    }

    fn run(&mut self, cx: &mut WorkerCx, budget: usize) -> Result<usize, RingFault> {
        let (vq, scratch) = (&mut self.vring.vq, &mut cx.scratch);
        match (&mut self.host, &mut cx.uring) {
            (HostDisk::Uring(disk), Some(ring)) => {
                let before = disk.unaligned();
                let work = self.handler.poll(vq, &mut disk.lend(ring), scratch, budget);
                self.blk_counters.unaligned.add(disk.unaligned() - before);
                work
            }
            // `attach` refuses a disk that needs a ring where there is none.
            (HostDisk::Uring(_), None) => Ok(0),
            (HostDisk::Ram(disk), _) => self.handler.poll(vq, disk, scratch, budget),
            (HostDisk::Null(disk), _) => self.handler.poll(vq, disk, scratch, budget),
        }
    }

    /// Sends tables that nothing in flight points into to be unmapped.
    #[cold]
    fn retire(&mut self, cx: &WorkerCx) {
        let oldest = self.handler.oldest_epoch();
        let unused = |table: &mut OldTable| {
            oldest.is_none_or(|oldest| oldest.wrapping_sub(table.until) < u32::MAX / 2)
        };
        for table in self.old_tables.extract_if(.., unused) {
            // Full: unmapped here and now.
            let _ = cx.retired.try_send(table.retired);
        }
    }
}

impl<F: RingFormat> VringEndpoint for DiskQueue<F> {
    fn attach(&mut self, cx: &mut WorkerCx) -> io::Result<()> {
        match (&mut self.host, &mut cx.uring) {
            (HostDisk::Uring(disk), Some(ring)) => disk.attach(ring, IN_FLIGHT_MAX),
            (HostDisk::Uring(_), None) => Err(io::Error::other("the worker has no io_uring")),
            (HostDisk::Ram(_) | HostDisk::Null(_), _) => Ok(()),
        }
    }

    fn detach(&mut self, cx: &mut WorkerCx) {
        if let (HostDisk::Uring(disk), Some(ring)) = (&mut self.host, &mut cx.uring) {
            disk.detach(ring);
        }
        self.retire(cx);
    }

    fn kick(&self) -> Option<&EventFd> {
        self.vring.kick()
    }

    fn disarm(&mut self) {
        self.vring.set_kicks(false);
    }

    fn drain(&mut self, cx: &mut WorkerCx) -> bool {
        self.poll(cx, 0);
        self.handler.in_flight() == 0
    }

    fn base(&self) -> u32 {
        self.vring.base()
    }

    fn set_fds(&mut self, fds: CallFds) -> CallFds {
        self.vring.set_fds(fds)
    }

    fn swap(&mut self, cx: &mut WorkerCx, ram: Arc<GuestRam>, areas: Areas) -> Option<Retired> {
        let (ram, areas) = self.vring.swap(ram, areas);
        let retired = Retired { ram, areas };
        if self.handler.in_flight() == 0 {
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
        let work = match self.run(cx, budget) {
            Ok(work) => work,
            Err(fault) => {
                self.vring.report(fault);
                // What the host completed is still answered.
                self.vring.publish();
                self.counters.in_flight.set(self.handler.in_flight() as u64);
                0
            }
        };
        if work > 0 {
            self.vring.publish();
            self.counters.in_flight.set(self.handler.in_flight() as u64);
            if !self.old_tables.is_empty() {
                self.retire(cx);
            }
        }
        work
    }

    fn arm(&mut self) -> Armed {
        // With every slot taken a completion comes first, and wakes us.
        if self.handler.has_room() && self.vring.set_kicks(true) {
            Armed::Work
        } else {
            Armed::Sleep
        }
    }
}
