//! virtio-blk: what a guest sees of a disk. VIRTIO 1.3 §5.2.
//!
//! [`BlkModel`] is the cold part. [`BlkHandler`] is the logic of one request queue: it pops chains,
//! parses them, hands the guest's segments to the host side, and answers what the host completed.
//! Every chain is answered: with data and a status byte, with a status byte alone, or, where there
//! is no room for one, as used with length 0.

mod config;
mod hold;
mod overdue;
mod ranges;
mod request;
mod sick;
mod size;
mod slots;
#[cfg(test)]
mod tests;
mod throttle;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};

use crate::host::blk::{BlkIo, BlkOp, Completion};
use crate::host::limit::Direction;
use crate::memory::{Segment, Segments, copy};
use crate::ring::{Chain, ChainQueue, Popped, RingFault};

pub use config::{BlkCounters, BlkModel, BlkSetup, BlkTopology, SEG_MAX, SIZE_MAX};
use ranges::Progress;
pub use ranges::RangeLimits;
use request::{HEADER_BYTES, parse};
pub use request::{Limits, Reject, Request};
use sick::Sick;
pub use sick::SickPolicy;
pub use size::DiskSize;
use slots::{Slot, Slots};
use throttle::Throttle;

/// A sector of VIRTIO 1.3 §5.2.4 in bytes, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;

/// Requests in flight at most per queue, however large its ring.
const SLOTS_MAX: u16 = 512;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;

// Error numbers that mean "again" or "the guest's buffer"; the same on every Linux.
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EFAULT: i32 = 14;

/// When a write may be acknowledged.
#[derive(Debug)]
struct Durability {
    /// The driver can't flush: only when it is durable (VIRTIO 1.3 §5.2.6.2).
    always: bool,
    /// The cache is off: likewise. Control changes it.
    write_through: Arc<AtomicBool>,
}

impl Durability {
    /// Whether a write that begins now must be durable when it is acknowledged.
    #[inline]
    fn now(&self) -> bool {
        self.always || self.write_through.load(Ordering::Relaxed)
    }
}

/// The logic of one request queue.
#[derive(Debug)]
pub struct BlkHandler {
    limits: Limits,
    size: Arc<DiskSize>,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    durability: Durability,
    slots: Slots,
    /// Slots whose operation the host had no room for, in order.
    waiting: VecDeque<u16>,
    /// Requests that a limit holds up.
    throttle: Throttle,
    /// Where the ranges of a request are read to.
    ranges: Vec<ranges::Range>,
    sick: Sick,
    counters: Arc<BlkCounters>,
}

impl BlkHandler {
    /// The handler of queue `index` of `model`, whose ring has `size` descriptors and whose driver
    /// acknowledged `features`. `None` when the disk has no such queue.
    pub fn new(model: &BlkModel, index: u16, size: u16, features: u64) -> Option<BlkHandler> {
        let setup = model.setup();
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(setup.serial.bytes()) {
            *to = from;
        }
        let slots = size.min(SLOTS_MAX);
        let label = format!("blk {} queue {index}", setup.name);
        let counters = Arc::clone(model.queue_counters(index)?);
        let limits = Arc::clone(&setup.limits);
        Some(BlkHandler {
            limits: Limits {
                capacity_bytes: model.size().end(),
                block_size: setup.block_size,
                read_only: setup.read_only,
                discard: features & (1 << VIRTIO_BLK_F_DISCARD) != 0,
                write_zeroes: features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0,
                ranges: setup.ranges,
            },
            size: Arc::clone(model.size()),
            serial,
            durability: Durability {
                always: features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
                write_through: model.write_through(),
            },
            slots: Slots::new(slots),
            waiting: VecDeque::with_capacity(usize::from(slots)),
            throttle: Throttle::new(limits, index, slots, Arc::clone(&counters)),
            ranges: Vec::new(),
            sick: Sick::new(setup.sick, slots, label, model.born()),
            counters,
        })
    }

    /// Answers what the host completed, then takes up to `budget` new requests. Returns how many
    /// requests were answered or taken. With no budget at all, what waits for a limit is not held
    /// up any longer: the queue is about to stop.
    ///
    /// # Errors
    /// The ring's fault, after everything before it was done.
    pub fn poll<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        scratch: &mut Segments,
        budget: usize,
    ) -> Result<usize, RingFault> {
        self.limits.capacity_bytes = self.size.end();
        let mut work = self.reap(vq, io)?;
        if self.sick.looks() && self.sick.look(&self.slots, &self.counters) {
            work += self.retry_held(vq, io);
        }
        self.resubmit(io);
        let limited = self.throttle.begin();
        if limited {
            work += self.release(io, budget == 0);
        }
        let taken = self.take(vq, io, scratch, budget);
        if limited {
            self.throttle.settle();
        }
        let taken = taken?;
        work += taken;
        if taken > 0 {
            // What completes at once is answered in the same turn.
            work += self.reap(vq, io)?;
        }
        Ok(work)
    }

    #[inline]
    fn take<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        scratch: &mut Segments,
        budget: usize,
    ) -> Result<usize, RingFault> {
        let mut taken = 0;
        while taken < budget && self.waiting.is_empty() && self.slots.has_room() {
            if self.throttle.is_active() && !self.throttle.is_open() {
                break;
            }
            scratch.clear();
            match vq.pop(scratch)? {
                Popped::Chain(chain) => self.begin(vq, io, chain, scratch),
                Popped::Empty | Popped::Wait => break,
            }
            taken += 1;
        }
        Ok(taken)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    /// When this must be polled next whatever comes; whoever asks sleeps until then.
    pub fn due(&mut self) -> Option<Instant> {
        self.sick.due(&self.slots, &self.counters)
    }

    /// The queue stops: what waits for space is tried once more, at the next poll, and fails if
    /// there is none.
    pub fn stop_holding(&mut self) {
        self.sick.end();
    }

    /// Whether no request is in flight; then nothing more is shown of any.
    pub fn is_drained(&mut self) -> bool {
        self.sick.due(&self.slots, &self.counters);
        self.slots.in_flight() == 0
    }

    /// Whether another request could be taken now.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.waiting.is_empty() && self.slots.has_room() && self.throttle.is_open()
    }

    /// How long until a request may pass that a limit holds up; `None` when there is none.
    pub fn wait(&self) -> Option<Duration> {
        // While the host has no room, a completion comes first.
        let has_room = self.waiting.is_empty();
        has_room.then(|| self.throttle.wait()).flatten()
    }

    /// Segments of new requests belong to another memory table from now on; returns its number.
    pub fn next_epoch(&mut self) -> u32 {
        self.slots.next_epoch()
    }

    /// The number of the oldest memory table that a request in flight points into.
    pub fn oldest_epoch(&self) -> Option<u32> {
        self.slots.oldest_epoch()
    }

    fn begin<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        chain: Chain,
        segments: &Segments,
    ) {
        let (readable, writable) = (chain.readable(segments), chain.writable(segments));
        match parse(readable, writable, &self.limits) {
            Ok(Request::GetId) => {
                self.counters.ids.add(1);
                let room = chain.writable_bytes as usize - 1;
                let told = copy::write(writable, 0, &self.serial[..room.min(self.serial.len())]);
                answer_at_once(vq, chain, writable, STATUS_OK, told);
            }
            Ok(request @ (Request::Discard | Request::WriteZeroes)) => {
                self.begin_ranges(vq, io, chain, segments, request);
            }
            Ok(request) => {
                let (index, slot) = self.slots.take(chain.id, request);
                // With writable bytes before it that nobody writes, the status byte is no start:
                // the length then promises nothing (VIRTIO 1.3 §2.7.8.2).
                slot.status_only = u32::from(chain.writable_bytes == 1);
                match request {
                    Request::In { bytes, .. } => cut(slot, writable, 0, bytes as usize),
                    Request::Out { bytes, .. } => {
                        cut(slot, readable, HEADER_BYTES, bytes as usize);
                    }
                    _ => {}
                }
                slot.segments.push(last_byte(writable));
                if self.throttle.is_active() {
                    self.offer(io, index);
                } else {
                    self.submit(io, index);
                }
            }
            Err(reject) => self.reject(vq, chain, writable, reject),
        }
    }

    fn reject<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        chain: Chain,
        writable: &[Segment],
        reject: Reject,
    ) {
        let Reject::Status(status) = reject else {
            self.counters.bad_chains.add(1);
            vq.put_used(chain.id, 0, &[]);
            return;
        };
        let counter = if status == STATUS_IOERR {
            &self.counters.errors
        } else {
            &self.counters.unsupported
        };
        counter.add(1);
        answer_at_once(vq, chain, writable, status, 0);
    }

    #[cold]
    fn begin_ranges<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        chain: Chain,
        segments: &Segments,
        request: Request,
    ) {
        let (readable, writable) = (chain.readable(segments), chain.writable(segments));
        let ranges = &mut self.ranges;
        if let Err(reject) = ranges::parse(request, readable, &self.limits, ranges) {
            return self.reject(vq, chain, writable, reject);
        }
        let (index, slot) = self.slots.take(chain.id, request);
        slot.status_only = u32::from(chain.writable_bytes == 1);
        slot.segments.push(last_byte(writable));
        core::mem::swap(&mut slot.ranges.list, ranges);
        slot.ranges.next = 0;
        if slot.ranges.list.is_empty() {
            self.answer(vq, index, STATUS_OK);
        } else if self.throttle.is_active() {
            self.offer(io, index);
        } else {
            self.submit(io, index);
        }
    }

    /// Hands the new request in slot `index` to the host, unless a limit holds it up. Apart, like
    /// all that is about limits: disks without any must not pay for it.
    #[cold]
    fn offer(&mut self, io: &mut dyn BlkIo, index: u16) {
        if let Some((direction, bytes)) = cost(self.slots.get(index))
            && !self.throttle.admits(index, direction, bytes)
        {
            return;
        }
        self.submit(io, index);
    }

    /// Hands the requests to the host that no limit holds up any more, or all with `force`.
    #[cold]
    fn release(&mut self, io: &mut dyn BlkIo, force: bool) -> usize {
        let mut count = 0;
        while force || self.waiting.is_empty() {
            let Some((index, direction)) = self.throttle.release(force) else {
                break;
            };
            let bytes = cost(self.slots.get(index)).map_or(0, |(_, bytes)| bytes);
            self.throttle.passed(direction, bytes);
            self.submit(io, index);
            count += 1;
        }
        count
    }

    /// Hands the rest of the request in slot `index` to the host.
    fn submit(&mut self, io: &mut dyn BlkIo, index: u16) {
        let token = self.slots.token(index);
        let slot = self.slots.get(index);
        let rest = &slot.segments[slot.next..slot.segments.len() - 1];
        let done = u64::from(slot.done);
        let op = match slot.request {
            Request::In { offset, .. } => BlkOp::Read {
                offset: offset + done,
                segments: rest,
            },
            Request::Out { offset, .. } => {
                let durable = self.durability.now();
                self.counters.durable_writes.add(u64::from(durable));
                BlkOp::Write {
                    offset: offset + done,
                    segments: rest,
                    durable,
                }
            }
            Request::Flush | Request::GetId => BlkOp::Flush,
            Request::Discard | Request::WriteZeroes => ranges::next_op(slot),
        };
        if io.submit(token, op).is_err() {
            self.waiting.push_back(index);
        }
    }

    fn resubmit(&mut self, io: &mut dyn BlkIo) {
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                return;
            };
            self.submit(io, index);
            // Still no room: it went to the back; the order within a queue is not promised.
            if self.waiting.back() == Some(&index) {
                return;
            }
        }
    }

    /// Tries again what waits for space. Returns how many requests were answered instead, because
    /// the disk has become smaller meanwhile.
    #[cold]
    fn retry_held<Q: ChainQueue>(&mut self, vq: &mut Q, io: &mut dyn BlkIo) -> usize {
        let mut answered = 0;
        for _ in 0..self.sick.held.waiting() {
            let Some(index) = self.sick.held.take() else {
                break;
            };
            let slot = self.slots.get(index);
            let end = match slot.request {
                Request::Out { offset, bytes } => Some(offset + u64::from(bytes)),
                _ => ranges::end_of_next(slot),
            };
            if end.is_some_and(|end| end > self.limits.capacity_bytes) {
                self.answer(vq, index, STATUS_IOERR);
                answered += 1;
            } else {
                self.counters.held_retries.add(1);
                self.submit(io, index);
            }
        }
        answered
    }

    /// Takes note that a request that waited for space was answered.
    #[cold]
    fn answered_held(&mut self, index: u16, ok: bool) {
        self.slots.get(index).held = false;
        self.sick.held.answered(ok, &self.sick.label);
        self.counters.held.set(self.sick.held.count());
    }

    fn reap<Q: ChainQueue>(&mut self, vq: &mut Q, io: &mut dyn BlkIo) -> Result<usize, RingFault> {
        let mut count = 0;
        while let Some(completion) = io.reap() {
            count += 1;
            self.complete(vq, io, completion)?;
        }
        Ok(count)
    }

    fn complete<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        completion: Completion,
    ) -> Result<(), RingFault> {
        let index = completion.token.slot;
        let slot = self.slots.of(completion.token);
        let status = match completion.result {
            Ok(moved) => match progress(slot, moved, &self.durability) {
                Progress::Done => STATUS_OK,
                // The file ends before the disk does: somebody cut it.
                Progress::Stuck => STATUS_IOERR,
                Progress::More => {
                    let ranged = matches!(slot.request, Request::Discard | Request::WriteZeroes);
                    self.counters.short_ios.add(u64::from(!ranged));
                    self.submit(io, index);
                    return Ok(());
                }
            },
            Err(EINTR | EAGAIN) => {
                self.waiting.push_back(index);
                return Ok(());
            }
            // The guest's buffer is not accessible: its fault, not the disk's. The chain is
            // answered all the same, so that nothing waits for it.
            Err(EFAULT) => {
                self.answer(vq, index, STATUS_IOERR);
                return Err(RingFault::Memory);
            }
            Err(errno) if self.sick.held.takes(errno, slot) => {
                self.sick.held.put(index, slot, &self.sick.label);
                self.counters.held.set(self.sick.held.count());
                return Ok(());
            }
            Err(_) => STATUS_IOERR,
        };
        self.answer(vq, index, status);
        Ok(())
    }

    /// Writes the status byte and puts the chain in the used ring.
    fn answer<Q: ChainQueue>(&mut self, vq: &mut Q, index: u16, status: u8) {
        let counters = &self.counters;
        let slot = self.slots.get(index);
        let last = slot.segments.len() - 1;
        copy::write(&slot.segments[last..], 0, &[status]);
        let ok = status == STATUS_OK;
        let written = match slot.request {
            Request::In { .. } => {
                counters.reads.add(u64::from(ok));
                counters
                    .read_bytes
                    .add(if ok { u64::from(slot.done) } else { 0 });
                if ok {
                    slot.done + 1
                } else {
                    blank(&slot.segments[..last])
                }
            }
            Request::Out { .. } => {
                counters.writes.add(u64::from(ok));
                counters
                    .write_bytes
                    .add(if ok { u64::from(slot.done) } else { 0 });
                slot.status_only
            }
            Request::Flush | Request::GetId => {
                counters.flushes.add(u64::from(ok));
                slot.status_only
            }
            Request::Discard => {
                let bytes = if ok {
                    ranges::bytes(&slot.ranges.list)
                } else {
                    0
                };
                counters.discards.add(u64::from(ok));
                counters.discard_bytes.add(bytes);
                slot.status_only
            }
            Request::WriteZeroes => {
                let bytes = if ok {
                    ranges::bytes(&slot.ranges.list)
                } else {
                    0
                };
                counters.write_zeroes.add(u64::from(ok));
                counters.zeroed_bytes.add(bytes);
                slot.status_only
            }
        };
        counters.errors.add(u64::from(!ok));
        let first = if matches!(slot.request, Request::In { .. }) {
            0
        } else {
            last
        };
        let held = slot.held;
        if let Some(chain) = slot.chain.take() {
            vq.put_used(chain, written, &slot.segments[first..]);
        }
        if held {
            self.answered_held(index, ok);
        }
        self.slots.free(index);
    }
}

/// What the request in `slot` is to a limit; `None` for one that is free. What is given up moves no
/// data: it counts as a write of no bytes.
fn cost(slot: &Slot) -> Option<(Direction, u64)> {
    match slot.request {
        Request::In { bytes, .. } => Some((Direction::Read, bytes.into())),
        Request::Out { bytes, .. } => Some((Direction::Write, bytes.into())),
        Request::Discard => Some((Direction::Write, 0)),
        Request::WriteZeroes => Some((Direction::Write, ranges::bytes(&slot.ranges.list))),
        Request::Flush | Request::GetId => None,
    }
}

/// Answers a chain that needs no host: `told` bytes were written from its start.
fn answer_at_once<Q: ChainQueue>(
    vq: &mut Q,
    chain: Chain,
    writable: &[Segment],
    status: u8,
    told: usize,
) {
    let data = chain.writable_bytes as usize - 1;
    let written = match told {
        // Nothing is missing before the status byte, or it is made up for.
        told if told == data => chain.writable_bytes,
        0 => blank(writable).min(chain.writable_bytes),
        told => u32::try_from(told).unwrap_or(u32::MAX),
    };
    copy::write(&[last_byte(writable)], 0, &[status]);
    vq.put_used(chain.id, written, writable);
}

/// Writes zeros to data that will never come, and returns the used length with the status byte
/// behind it. `used.len` counts bytes written without a gap (VIRTIO 1.3 §2.7.8.2), and drivers
/// expect the status byte among them. A request of a size that no driver makes is not worth the
/// time: its length is 0.
fn blank(data: &[Segment]) -> u32 {
    const WORTH_BYTES: usize = 4 << 20;
    let bytes: usize = data.iter().map(Segment::len).sum();
    if bytes > WORTH_BYTES {
        return 0;
    }
    copy::zero(data, 0, bytes);
    u32::try_from(bytes + 1).unwrap_or(0)
}

/// Puts `bytes` bytes of `from`, from `skip` on, into the slot's list.
fn cut(slot: &mut Slot, from: &[Segment], mut skip: usize, mut bytes: usize) {
    for segment in from {
        let here = segment.skip(skip);
        skip -= segment.len() - here.len();
        let here = here.take(bytes);
        bytes -= here.len();
        if !here.is_empty() {
            slot.segments.push(here);
        }
    }
}

/// Notes that the host did `moved` bytes of what the request in `slot` needed next.
fn progress(slot: &mut Slot, moved: u32, durability: &Durability) -> Progress {
    let wanted = match slot.request {
        Request::In { bytes, .. } | Request::Out { bytes, .. } => bytes,
        Request::Flush | Request::GetId => 0,
        Request::Discard | Request::WriteZeroes => {
            return ranges::advance(slot, moved, durability.now());
        }
    };
    advance(slot, moved.min(wanted - slot.done));
    match (slot.done == wanted, moved) {
        (true, _) => Progress::Done,
        (false, 0) => Progress::Stuck,
        (false, _) => Progress::More,
    }
}

/// Moves the slot's place in its data past `moved` more bytes. Segments that are done stay in the
/// list, for the dirty log; one that is done in part is cut in two.
fn advance(slot: &mut Slot, moved: u32) {
    slot.done += moved;
    let mut left = moved as usize;
    while left > 0 {
        let segment = slot.segments[slot.next];
        if left < segment.len() {
            slot.segments[slot.next] = segment.skip(left);
            slot.segments.insert(slot.next, segment.take(left));
        }
        left -= left.min(segment.len());
        slot.next += 1;
    }
}

/// The last byte of `segments`, which have at least one.
fn last_byte(segments: &[Segment]) -> Segment {
    let last = segments.iter().rev().find(|segment| !segment.is_empty());
    last.map_or(Segment::EMPTY, |segment| segment.skip(segment.len() - 1))
}
