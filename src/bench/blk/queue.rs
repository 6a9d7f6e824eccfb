//! One request queue under load: what is in flight, and what became of it.
//!
//! Every request that may be in flight has a slot, and a slot a chain that is made once. A request
//! writes its sector, and its type when that changes; nothing else of the chain. The last slot is
//! for FLUSH. VIRTIO 1.3 §5.2.6.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::BenchError;
use super::super::histogram::Histogram;
use super::super::ring::{Buffer, LoadRing, NotInFlight, Setup};
use super::layout::{HEADER_AT, Layout, Place, SLOT_BYTES, STATUS_AT, TABLE_AT};
use super::stamp::mix;
use super::verify::Verify;
use super::work::Work;
use super::{KINDS, Kind};
use crate::config::{BenchBlkConfig, Chains};
use crate::memory::{Area, GuestRam, Segment, copy};
use crate::ring::Desc;
use crate::sys::clock::Clock;

pub(super) const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: u32 = 16;
/// What DISCARD has for data: sector, number of sectors, flags.
const RANGE_BYTES: u32 = 16;
/// Nobody answers this.
const NO_STATUS: u16 = 0xff;

/// What a thread's queues did.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Requests done, by [`Kind`].
    pub done: [u64; KINDS],
    /// Ticks from submission to the reaping of the batch, by [`Kind`].
    pub latency: [Histogram; KINDS],
    /// Kicks that the back-end asked for.
    pub kicks: u64,
}

impl Tally {
    /// Requests done.
    pub(super) fn all(&self) -> u64 {
        self.done.iter().sum()
    }
}

/// A request that may be in flight.
#[derive(Debug, Clone, Copy)]
struct Slot {
    submitted: u64,
    block: u64,
    /// Where the sector is written, behind the first slot.
    sector_at: usize,
    kind: Kind,
    busy: bool,
}

/// A request queue.
#[derive(Debug)]
pub(super) struct Queue<R> {
    number: u16,
    ring: R,
    place: Place,
    area: Area,
    slots: Box<[Slot]>,
    data: Box<[Segment]>,
    work: Work,
    /// The next block that is read back, once that has begun.
    reading_back: Option<u64>,
    verify: Option<Box<Verify>>,
    kick: EventFd,
    call: EventFd,
    block_bytes: u32,
    sectors: u64,
    chains: Chains,
    rewrite: bool,
    in_flight: usize,
    /// FLUSH after so many writes; 0 is never.
    fsync: u32,
    unflushed: u32,
    /// Keeps `data` valid.
    _ram: Arc<GuestRam>,
}

impl<R: LoadRing> Queue<R> {
    /// Queue `number` in its place of `ram`, with nothing in flight.
    ///
    /// # Errors
    /// When the place is not in `ram`, or there are no eventfds.
    pub(super) fn new(
        config: &BenchBlkConfig,
        ram: &Arc<GuestRam>,
        layout: &Layout,
        number: u16,
        work: Work,
        verify: Option<Verify>,
    ) -> Result<Queue<R>, BenchError> {
        let place = layout.place(number);
        let setup = Setup {
            size: layout.ring_size,
            event_idx: config.event_idx,
            in_order: false,
            write: false,
            chain: layout.chain,
            at: place.rings_at(),
        };
        let depth = usize::from(config.io_depth);
        let data = |index: usize| {
            let at = place.gpa(place.data_at + index * place.stride);
            ram.finder()(at, config.block_bytes).unwrap_or(Segment::EMPTY)
        };
        let area = ram.area(place.slots_at(), place.bytes, 64);
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BenchError::Eventfd);
        let slot = Slot {
            submitted: 0,
            block: 0,
            sector_at: 0,
            kind: Kind::Flush,
            busy: false,
        };
        let mut queue = Queue {
            number,
            ring: R::new(ram, &setup).map_err(BenchError::Memory)?,
            place,
            area: area.map_err(BenchError::Memory)?,
            slots: vec![slot; depth + 1].into(),
            data: (0..=depth).map(data).collect(),
            work,
            reading_back: None,
            verify: verify.map(Box::new),
            kick: eventfd()?,
            call: eventfd()?,
            block_bytes: config.block_bytes,
            sectors: u64::from(config.block_bytes) / SECTOR_BYTES,
            chains: config.chains,
            rewrite: config.rewrite,
            in_flight: 0,
            fsync: config.fsync.unwrap_or(0),
            unflushed: 0,
            _ram: Arc::clone(ram),
        };
        queue.fill();
        for id in 0..queue.slots.len() {
            queue.arrange(id, Kind::Flush);
        }
        Ok(queue)
    }

    /// Data that no compressing disk makes short work of.
    fn fill(&mut self) {
        let mut state = u64::from(self.number) << 48;
        let mut bytes = vec![0; self.block_bytes as usize];
        for data in &self.data {
            for to in bytes.chunks_exact_mut(8) {
                to.copy_from_slice(&mix(&mut state).to_le_bytes());
            }
            copy::write(&[*data], 0, &bytes);
        }
    }

    /// Makes the chain of slot `id` one of `kind`.
    fn arrange(&mut self, id: usize, kind: Kind) {
        let (slot_at, data_at) = (id * SLOT_BYTES, self.place.data_at + id * self.place.stride);
        let header_at = slot_at + HEADER_AT;
        let buffer = |at: usize, len: u32, flags: u16| Buffer {
            addr: self.place.gpa(at),
            len,
            flags,
        };
        let (request, data) = match kind {
            Kind::Read => (VIRTIO_BLK_T_IN, Some((self.block_bytes, Desc::WRITE))),
            Kind::Write => (VIRTIO_BLK_T_OUT, Some((self.block_bytes, 0))),
            Kind::Trim => (VIRTIO_BLK_T_DISCARD, Some((RANGE_BYTES, 0))),
            Kind::Flush => (VIRTIO_BLK_T_FLUSH, None),
        };
        let header = buffer(header_at, HEADER_BYTES, 0);
        let status = buffer(slot_at + STATUS_AT, 1, Desc::WRITE);
        let three;
        let buffers: &[Buffer] = match data {
            Some((len, flags)) => {
                three = [header, buffer(data_at, len, flags), status];
                &three
            }
            None => &[header, status],
        };
        let ring_id = index(id);
        if self.chains == Chains::Indirect {
            let count = index(buffers.len());
            for (at, buffer) in (0..count).zip(buffers) {
                let [addr, rest] = R::table_entry(at, count, buffer);
                let at = slot_at + TABLE_AT + 16 * usize::from(at);
                self.area.store64(at, addr);
                self.area.store64(at + 8, rest);
            }
            let table = buffer(slot_at + TABLE_AT, u32::from(count) * 16, Desc::INDIRECT);
            self.ring.set_chain(ring_id, &[table]);
        } else {
            self.ring.set_chain(ring_id, buffers);
        }
        // Type, and a priority that nobody has used since VIRTIO 1.0.
        self.area.store64(header_at, u64::from(request));
        self.area.store64(header_at + 8, 0);
        self.slots[id].sector_at = header_at + 8;
        if kind == Kind::Trim {
            self.slots[id].sector_at = data_at;
            self.area.store64(data_at + 8, self.sectors);
        }
        self.slots[id].kind = kind;
    }

    /// Eventfds: kick and call.
    pub(super) fn eventfds(&self) -> (&EventFd, &EventFd) {
        (&self.kick, &self.call)
    }

    /// Blocks that were checked.
    pub(super) fn checked(&self) -> u64 {
        self.verify.as_ref().map_or(0, |verify| verify.checked)
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits as many requests as may be in flight; none is now.
    pub(super) fn start(&mut self, clock: &Clock, tally: &mut Tally) {
        let now = clock.now();
        for id in 0..self.slots.len() - 1 {
            self.submit(id, now);
        }
        self.publish(tally);
        // Kicked once in any case: the back-end may not have said yet that it wants it.
        let _ = self.kick.write(1);
    }

    /// Takes what is done, and submits as many again when told so.
    ///
    /// # Errors
    /// When a request failed or brought the wrong bytes, or the back-end breaks the ring's rules.
    #[inline]
    pub(super) fn turn(
        &mut self,
        clock: &Clock,
        again: bool,
        tally: &mut Tally,
    ) -> Result<(), BenchError> {
        let mut batch = None;
        while let Some((id, _)) = self.ring.used().map_err(|fault| self.broken(fault))? {
            // One look at the clock for all that are done.
            let now = *batch.get_or_insert_with(|| clock.now());
            let id = usize::from(id);
            self.finish(id, now, tally)?;
            if again && id + 1 < self.slots.len() {
                self.submit(id, now);
            }
        }
        if let Some(now) = batch {
            if self.fsync > 0 && self.unflushed >= self.fsync && again {
                self.flush(now);
            }
            self.publish(tally);
        }
        Ok(())
    }

    #[inline]
    fn finish(&mut self, id: usize, now: u64, tally: &mut Tally) -> Result<(), BenchError> {
        self.in_flight -= 1;
        let slot = &mut self.slots[id];
        slot.busy = false;
        let Slot {
            submitted,
            kind,
            block,
            ..
        } = *slot;
        let status = self.area.load16(id * SLOT_BYTES + STATUS_AT) & 0xff;
        if u32::from(status) != VIRTIO_BLK_S_OK {
            return Err(self.failed(kind, block, status));
        }
        tally.done[kind as usize] += 1;
        tally.latency[kind as usize].record(now.saturating_sub(submitted));
        if let Some(verify) = &mut self.verify
            && kind != Kind::Flush
        {
            verify.release(block);
            if kind == Kind::Read {
                let checked = verify.check(block, self.data[id]);
                checked.map_err(BenchError::Verify)?;
            }
        }
        Ok(())
    }

    /// Posts the next request of the work in slot `id`, if there is one.
    #[inline]
    fn submit(&mut self, id: usize, now: u64) {
        let Some((kind, mut block)) = self.next() else {
            return;
        };
        if self.rewrite || kind != self.slots[id].kind {
            self.arrange(id, kind);
        }
        if let Some(verify) = &mut self.verify {
            block = verify.claim(block);
            if kind == Kind::Write {
                verify.stamp(block, self.data[id]);
            }
        }
        self.unflushed += u32::from(kind == Kind::Write);
        self.post(id, block, now);
    }

    #[inline]
    fn post(&mut self, id: usize, block: u64, now: u64) {
        let slot = &mut self.slots[id];
        (slot.submitted, slot.block, slot.busy) = (now, block, true);
        self.area.store64(slot.sector_at, block * self.sectors);
        if self.verify.is_some() {
            // A status that stands from the request before would do otherwise, as it does in Linux.
            self.area.store16(id * SLOT_BYTES + STATUS_AT, NO_STATUS);
        }
        self.in_flight += 1;
        self.ring.post_chain(index(id));
    }

    fn flush(&mut self, now: u64) {
        let id = self.slots.len() - 1;
        if !self.slots[id].busy {
            self.unflushed = 0;
            if self.rewrite {
                self.arrange(id, Kind::Flush);
            }
            self.post(id, 0, now);
        }
    }

    #[inline]
    fn publish(&mut self, tally: &mut Tally) {
        if self.ring.publish() {
            tally.kicks += 1;
            // A full counter has a kick pending already.
            let _ = self.kick.write(1);
        }
    }

    /// From the next [`Queue::start`] on, every block that was written is read and checked.
    pub(super) fn read_back(&mut self) {
        self.reading_back = Some(self.work.first());
    }

    #[inline]
    fn next(&mut self) -> Option<(Kind, u64)> {
        match self.reading_back {
            None => self.work.next(),
            Some(from) => self.next_written(from),
        }
    }

    fn next_written(&mut self, from: u64) -> Option<(Kind, u64)> {
        let block = self.verify.as_ref()?.written_from(from)?;
        self.reading_back = Some(block + 1);
        Some((Kind::Read, block))
    }

    fn broken(&self, fault: NotInFlight) -> BenchError {
        BenchError::Ring {
            queue: usize::from(self.number),
            problem: fault.to_string(),
        }
    }

    #[cold]
    fn failed(&self, kind: Kind, block: u64, status: u16) -> BenchError {
        let answer = match status {
            1 => "answered with an I/O error".to_owned(),
            2 => "answered as not supported".to_owned(),
            NO_STATUS => "given back without a status".to_owned(),
            other => format!("answered with status {other}"),
        };
        BenchError::Request {
            queue: usize::from(self.number),
            request: kind.name(),
            bytes: if kind == Kind::Flush {
                0
            } else {
                self.block_bytes
            },
            offset: block * u64::from(self.block_bytes),
            answer,
        }
    }
}

/// Ids are 16 bits wide; there are no more of them than a ring has descriptors.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "below 32768")]
fn index(id: usize) -> u16 {
    id as u16
}
