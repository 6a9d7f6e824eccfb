//! `Backing`: where the blocks of a disk are, and what serves a queue of it.

use std::sync::Arc;

use crate::host::fault::{FaultDisk, FaultPlan};
use crate::host::null::NullDisk;
use crate::host::qcow2::{Qcow2Image, Waker};
use crate::host::ram::RamDisk;
use crate::host::uring::UringDisk;
use crate::memory::Store;
use crate::sys::disk::DiskFile;
use crate::sys::key::DiskKey;

use super::disk::{EncryptedDisk, HostDisk, IN_FLIGHT_MAX};
use super::handle::Place;
use super::worker::UringNeed;

/// How a disk is encrypted.
#[derive(Debug, Clone)]
pub struct Encryption {
    /// With what.
    pub key: Arc<DiskKey>,
    /// Bytes of a sector, which is encrypted as one: no more than the disk's block size.
    pub sector: u32,
}

/// Where the blocks of a disk are.
#[derive(Debug, Clone)]
pub enum Backing {
    /// A file or block device.
    File(Arc<DiskFile>),
    /// A file or block device with ciphertext on it.
    Encrypted(Arc<DiskFile>, Encryption),
    /// A qcow2 image.
    Qcow2(Arc<Qcow2Image>),
    /// Memory of the daemon.
    Ram(Arc<Store>),
    /// Nowhere.
    Null,
    /// One of the others, with faults.
    Faulty(FaultPlan, Box<Backing>),
}

impl Backing {
    /// What serves one queue of it at `place`, in blocks of `block_size` bytes.
    pub(super) fn queue(&self, block_size: u32, place: &Place) -> HostDisk {
        match self {
            Backing::File(file) => HostDisk::Uring(UringDisk::new(Arc::clone(file))),
            Backing::Encrypted(file, how) => {
                let disk = UringDisk::new(Arc::clone(file));
                HostDisk::Encrypted(EncryptedDisk::new(disk, how.clone()))
            }
            Backing::Qcow2(image) => {
                let mailbox = Arc::clone(&place.mailbox);
                let waker = Waker(Arc::new(move || mailbox.nudge()));
                HostDisk::Qcow2(Box::new(image.queue(IN_FLIGHT_MAX, waker)))
            }
            Backing::Ram(store) => {
                HostDisk::Ram(RamDisk::new(Arc::clone(store), IN_FLIGHT_MAX.into()))
            }
            Backing::Null => HostDisk::Null(NullDisk::new(IN_FLIGHT_MAX.into())),
            Backing::Faulty(plan, disk) => {
                let faults = FaultDisk::new(*plan, block_size);
                HostDisk::Faulty(Box::new((faults, disk.queue(block_size, place))))
            }
        }
    }

    pub(super) fn uring(&self) -> UringNeed {
        let with = |sqpoll| match sqpoll {
            true => UringNeed::WithThread,
            false => UringNeed::Ring,
        };
        match self {
            Backing::File(file) | Backing::Encrypted(file, _) => with(file.io().sqpoll),
            Backing::Qcow2(image) => with(image.io().sqpoll),
            Backing::Ram(_) | Backing::Null => UringNeed::Nothing,
            Backing::Faulty(_, disk) => disk.uring(),
        }
    }
}
