//! virtio-blk: what a guest sees of a disk. VIRTIO 1.3 §5.2.
//!
//! [`BlkModel`] is the cold part. [`BlkHandler`] is the logic of one request queue: it pops chains,
//! parses them, hands the guest's segments to the host side, and answers what the host completed.
//! Every chain is answered, with data and a status byte or with a status byte alone. One that can't
//! be breaks the ring, and stays where it is: as used, it would pass for done.

mod config;
mod hold;
mod overdue;
mod pieces;
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
use pieces::{answer_at_once, blank, cut, cut_after, is_short, last_byte, next_piece};
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

/// Chains popped before the first of them is looked at, so that the headers, which the guest wrote
/// on another core, all come at the same time.
const POPPED_MAX: usize = 16;

/// What a queue hands to the host, or takes back from it, in one turn: some hosts move or encrypt
/// data on the worker, whose other queues wait meanwhile. One more piece may go beyond it.
const TURN_BYTES: u64 = 4 << 20;

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
    /// Bytes that may still go to the host or come from it in this turn.
    left: u64,
    /// Requests that a limit holds up.
    throttle: Throttle,
    /// Chains that are popped and not looked at yet; empty between polls.
    popped: Vec<Chain>,
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
            left: TURN_BYTES,
            throttle: Throttle::new(limits, index, slots, Arc::clone(&counters)),
            popped: Vec::with_capacity(POPPED_MAX),
            ranges: Vec::new(),
            sick: Sick::new(setup.sick, slots, label, model.born()),
            counters,
        })
    }

    /// Answers what the host completed, then takes up to `budget` new requests. Returns how many
    /// requests were answered or taken.
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
        self.left = TURN_BYTES;
        let mut work = self.reap(vq, io)?;
        if self.sick.looks() && self.sick.look(&self.slots, &self.counters) {
            work += self.retry_held(vq, io);
        }
        if !self.waiting.is_empty() {
            work += self.resubmit(vq, io);
        }
        let limited = self.throttle.begin();
        if limited {
            work += self.release(vq, io);
        }
        let taken = self.take(vq, io, scratch, budget);
        if limited {
            self.throttle.settle();
        }
        if taken != Ok(0) {
            // What completes at once is answered in the same turn, before a fault too.
            work += self.reap(vq, io)?;
        }
        Ok(work + taken?)
    }

    #[inline]
    fn take<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        scratch: &mut Segments,
        budget: usize,
    ) -> Result<usize, RingFault> {
        let mut popped = core::mem::take(&mut self.popped);
        let mut taken = 0;
        let mut end = Ok(());
        while taken < budget && self.waiting.is_empty() && self.left > 0 && end.is_ok() {
            let limited = self.throttle.is_active();
            if limited && !self.throttle.is_open() {
                break;
            }
            let most = if limited { 1 } else { POPPED_MAX };
            let most = most.min(budget - taken).min(self.slots.room());
            scratch.clear();
            end = pop_ahead(vq, scratch, &mut popped, most);
            if popped.is_empty() {
                break;
            }
            taken += popped.len();
            let mut begun = Ok(());
            for chain in popped.drain(..) {
                // Behind one that can't be answered nothing is done.
                if begun.is_ok() {
                    begun = self.begin(vq, io, chain, scratch);
                }
            }
            end = begun.and(end);
        }
        self.popped = popped;
        end.map(|()| taken)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    /// When this must be polled next whatever comes; whoever asks sleeps until then.
    pub fn due(&mut self) -> Option<Instant> {
        self.sick.due(&self.slots, &self.counters)
    }

    /// The queue stops: what waits for a limit waits no longer. What waits for space is tried once
    /// more, at the next poll, and fails if there is none.
    pub fn stop_holding(&mut self) {
        self.sick.end();
        self.throttle.end();
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
    ) -> Result<(), RingFault> {
        let (readable, writable) = (chain.readable(segments), chain.writable(segments));
        match parse(readable, writable, &self.limits) {
            Ok(Request::GetId) => {
                self.counters.ids.add(1);
                let room = chain.writable_bytes as usize - 1;
                let told = copy::write(writable, 0, &self.serial[..room.min(self.serial.len())]);
                answer_at_once(vq, chain, writable, STATUS_OK, told);
            }
            Ok(request @ (Request::Discard | Request::WriteZeroes)) => {
                return self.begin_ranges(vq, io, chain, segments, request);
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
            Err(reject) => return self.reject(vq, chain, writable, reject),
        }
        Ok(())
    }

    fn reject<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        chain: Chain,
        writable: &[Segment],
        reject: Reject,
    ) -> Result<(), RingFault> {
        let Reject::Status(status) = reject else {
            self.counters.bad_chains.add(1);
            return Err(RingFault::Unanswerable);
        };
        let counter = if status == STATUS_IOERR {
            &self.counters.errors
        } else {
            &self.counters.unsupported
        };
        counter.add(1);
        self.left = self.left.saturating_sub(chain.writable_bytes.into());
        answer_at_once(vq, chain, writable, status, 0);
        Ok(())
    }

    #[cold]
    fn begin_ranges<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        io: &mut dyn BlkIo,
        chain: Chain,
        segments: &Segments,
        request: Request,
    ) -> Result<(), RingFault> {
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
        Ok(())
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

    /// Hands the requests to the host that no limit holds up any more, or all when the queue stops.
    #[cold]
    fn release<Q: ChainQueue>(&mut self, vq: &mut Q, io: &mut dyn BlkIo) -> usize {
        let mut count = 0;
        while self.throttle.is_at_its_end() || self.waiting.is_empty() {
            let Some((index, direction)) = self.throttle.release() else {
                break;
            };
            let bytes = cost(self.slots.get(index)).map_or(0, |(_, bytes)| bytes);
            self.throttle.passed(direction, bytes);
            self.submit_late(vq, io, index);
            count += 1;
        }
        count
    }

    /// Hands the request in slot `index`, which has waited, to the host, unless the disk has become
    /// smaller meanwhile: a write would make its file larger again. Whether it was answered
    /// instead.
    #[cold]
    fn submit_late<Q: ChainQueue>(&mut self, vq: &mut Q, io: &mut dyn BlkIo, index: u16) -> bool {
        let slot = self.slots.get(index);
        let end = match slot.request {
            Request::Out { offset, bytes } => Some(offset + u64::from(bytes)),
            _ => ranges::end_of_next(slot),
        };
        let beyond = end.is_some_and(|end| end > self.limits.capacity_bytes);
        if beyond {
            self.answer(vq, index, STATUS_IOERR);
        } else {
            self.submit(io, index);
        }
        beyond
    }

    /// Hands the next piece of the request in slot `index` to the host.
    fn submit(&mut self, io: &mut dyn BlkIo, index: u16) {
        if self.left == 0 {
            self.waiting.push_back(index);
            return;
        }
        let token = self.slots.token(index);
        let slot = self.slots.get(index);
        let done = u64::from(slot.done);
        let (op, bytes) = match slot.request {
            Request::In { offset, bytes } => {
                let (segments, bytes) = next_piece(slot, bytes);
                let offset = offset + done;
                (BlkOp::Read { offset, segments }, bytes)
            }
            Request::Out { offset, bytes } => {
                let durable = self.durability.now();
                self.counters.durable_writes.add(u64::from(durable));
                let (segments, bytes) = next_piece(slot, bytes);
                let op = BlkOp::Write {
                    offset: offset + done,
                    segments,
                    durable,
                };
                (op, bytes)
            }
            Request::Flush | Request::GetId => (BlkOp::Flush, 0),
            Request::Discard | Request::WriteZeroes => ranges::next_op(slot),
        };
        if io.submit(token, op).is_ok() {
            self.left = self.left.saturating_sub(bytes.into());
        } else {
            self.waiting.push_back(index);
        }
    }

    /// Hands what waits for the host, or for this turn, to it. Returns how many it took, or were
    /// answered instead.
    #[cold]
    fn resubmit<Q: ChainQueue>(&mut self, vq: &mut Q, io: &mut dyn BlkIo) -> usize {
        let mut work = 0;
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                break;
            };
            self.submit_late(vq, io, index);
            // Still no room: it went to the back; the order within a queue is not promised.
            if self.waiting.back() == Some(&index) {
                break;
            }
            work += 1;
        }
        work
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
            if self.submit_late(vq, io, index) {
                answered += 1;
            } else {
                self.counters.held_retries.add(1);
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
        while self.left > 0
            && let Some(completion) = io.reap()
        {
            count += 1;
            let moved = completion.result.unwrap_or(0);
            self.left = self.left.saturating_sub(moved.into());
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
                    let short = is_short(slot, moved);
                    self.counters.short_ios.add(u64::from(short));
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

/// Pops up to `most` chains, and asks for the lines that their headers and status bytes are in,
/// which are the same in most drivers. A fault comes after the chains before it.
#[inline]
fn pop_ahead<Q: ChainQueue>(
    vq: &mut Q,
    segments: &mut Segments,
    popped: &mut Vec<Chain>,
    most: usize,
) -> Result<(), RingFault> {
    while popped.len() < most {
        let Popped::Chain(chain) = vq.pop(segments)? else {
            break;
        };
        if let Some(header) = chain.readable(segments).first() {
            copy::prefetch_write(header);
        }
        if let Some(status) = chain.writable(segments).last() {
            copy::prefetch_write(status);
        }
        popped.push(chain);
    }
    Ok(())
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
    slot.next = cut_after(slot, moved as usize);
}
