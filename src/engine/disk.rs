//! `DiskQueue`: a request queue of a disk, with the host side that serves it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::blk::BlkHandler;
use crate::host::blk::BlkIo;
use crate::host::null::NullDisk;
use crate::host::ram::RamDisk;
use crate::host::uring::UringDisk;
use crate::memory::GuestRam;
use crate::ring::{Areas, RingFormat};
use crate::sync::Counter;

use super::endpoint::{GuestDisk, VringEndpoint};
use super::link::Armed;
use super::mailbox::{CallFds, Retired};
use super::started::{Vring, VringCounters};
use super::worker::WorkerCx;

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

/// A request queue.
#[derive(Debug)]
pub(super) struct DiskQueue<F: RingFormat> {
    vring: Vring<F>,
    handler: BlkHandler,
    host: HostDisk,
    counters: Arc<VringCounters>,
}
