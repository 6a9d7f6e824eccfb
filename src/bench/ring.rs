//! The driver side of a virtqueue for load, nothing allocated per chain.
//!
//! Chains are either of one descriptor, for one fixed buffer per id ([`LoadRing::post`]), or made
//! beforehand and posted again and again ([`LoadRing::set_chain`], [`LoadRing::post_chain`]).
//!
//! Ids are handed out in the order in which the device gave them back, from 0 on: a device that
//! keeps the order meets every id in the same slot for ever, as IN_ORDER asks (VIRTIO 1.3 §2.7.9,
//! §2.8.8), and rewrites of what stands in the ring already are left out.

use std::sync::Arc;

use crate::memory::{GuestRam, MemoryError};
use crate::ring::event::{PackedCursor, need_event, packed_need_event};
use crate::ring::{Areas, Desc, Packed, RingFormat, Split};
use crate::sync::{Ordering, fence};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// What the device did that no device may do: it gave back a buffer that it did not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("used buffer id {id}, which was not in flight in a ring of {size}")]
pub(super) struct NotInFlight {
    id: u32,
    size: u16,
}

/// How a ring is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    /// Descriptors: of a split ring a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER was negotiated: one used element may stand for several buffers.
    pub in_order: bool,
    /// The device writes the buffers.
    pub write: bool,
    /// Descriptors of a chain at most, up to [`CHAIN_MAX`]: the ring has `size / chain` ids.
    pub chain: u16,
    /// Front-end addresses of descriptor, driver and device area.
    pub at: [u64; 3],
}

impl Setup {
    /// How many ids there are: all, unless chains may have several descriptors.
    fn ids(&self) -> u16 {
        self.size / self.chain
    }
}

/// Descriptors of a chain at most: header, data and status of a disk's request.
pub(super) const CHAIN_MAX: usize = 3;

/// One descriptor of a chain made beforehand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`Desc::WRITE`], [`Desc::INDIRECT`] or nothing.
    pub flags: u16,
}

/// The driver side of one virtqueue. Calls are off.
pub(super) trait LoadRing: Sized {
    /// The device side's format.
    type Format: RingFormat;

    /// A fresh ring.
    ///
    /// # Errors
    /// When the areas are not in `ram`.
    fn new(ram: &Arc<GuestRam>, setup: &Setup) -> Result<Self, MemoryError>;

    /// Which ids are whose.
    fn ids(&mut self) -> &mut Ids;

    /// Gives the buffer of `id` to the device, from the next [`LoadRing::publish`] on.
    fn post(&mut self, id: u16, addr: u64, len: u32);

    /// Says what [`LoadRing::post_chain`] posts for `id`, which the device must not have now: up to
    /// `chain` buffers.
    fn set_chain(&mut self, id: u16, buffers: &[Buffer]);

    /// Gives the chain of `id` to the device, from the next [`LoadRing::publish`] on.
    fn post_chain(&mut self, id: u16);

    /// The two words of descriptor `index` of an indirect table that has `count`.
    fn table_entry(index: u16, count: u16, buffer: &Buffer) -> [u64; 2];

    /// Shows everything posted. Returns whether the device wants a kick for it.
    fn publish(&mut self) -> bool;

    /// The next buffer that the device gave back: its id, and the bytes written.
    ///
    /// # Errors
    /// When the device did not have it.
    fn used(&mut self) -> Result<Option<(u16, u32)>, NotInFlight>;
}

/// The ids of a ring: which are free, which are in flight.
#[derive(Debug)]
pub(super) struct Ids {
    size: u16,
    /// A queue: ids leave at `head`, `room` of them are there.
    free: Box<[u16]>,
    head: u16,
    room: u16,
    in_flight: Box<[bool]>,
    /// With IN_ORDER: the oldest id in flight, and the buffers of a batch not handed out yet.
    oldest: u16,
    batch: Option<Batch>,
}

/// Buffers that one used element gave back.
#[derive(Debug, Clone, Copy)]
struct Batch {
    left: u16,
    written: u32,
}

impl Ids {
    fn new(setup: &Setup) -> Ids {
        let size = setup.ids();
        Ids {
            size,
            free: (0..size).collect(),
            head: 0,
            room: size,
            in_flight: vec![false; usize::from(size)].into(),
            oldest: 0,
            batch: None,
        }
    }

    /// A place less than two laps on, in its lap: a packed ring has any size.
    #[inline]
    fn wrap(&self, place: u16) -> u16 {
        if place < self.size {
            place
        } else {
            place - self.size
        }
    }

    /// Ids that nobody has.
    pub(super) fn room(&self) -> u16 {
        self.room
    }

    /// The id that is free for the longest time.
    #[inline]
    pub(super) fn take(&mut self) -> Option<u16> {
        let room = self.room.checked_sub(1)?;
        let id = self.free[usize::from(self.head)];
        self.head = self.wrap(self.head + 1);
        self.room = room;
        Some(id)
    }

    /// Puts an id back that [`LoadRing::used`] returned.
    #[inline]
    pub(super) fn put(&mut self, id: u16) {
        let tail = self.wrap(self.head + self.room);
        self.free[usize::from(tail)] = id;
        self.room += 1;
    }

    #[inline]
    fn come_back(&mut self, id: u32) -> Result<u16, NotInFlight> {
        let size = self.size;
        let fault = NotInFlight { id, size };
        let id = u16::try_from(id).map_err(|_| fault)?;
        match self.in_flight.get_mut(usize::from(id)) {
            Some(flag) if *flag => *flag = false,
            _ => return Err(fault),
        }
        Ok(id)
    }

    /// With IN_ORDER, an element for `id` stands for all buffers up to it. Returns how many.
    fn begin_batch(&mut self, id: u32, written: u32) -> Result<u16, NotInFlight> {
        let size = self.size;
        let last = u16::try_from(id).ok().filter(|id| *id < size);
        let last = last.ok_or(NotInFlight { id, size })?;
        let left = self.wrap(last + (size - self.oldest)) + 1;
        self.batch = Some(Batch { left, written });
        Ok(left)
    }

    fn next_of_batch(&mut self) -> Result<Option<(u16, u32)>, NotInFlight> {
        let Some(Batch { left, written }) = self.batch else {
            return Ok(None);
        };
        let id = self.come_back(u32::from(self.oldest))?;
        self.oldest = self.wrap(id + 1);
        self.batch = (left > 1).then_some(Batch {
            left: left - 1,
            written,
        });
        Ok(Some((id, written)))
    }
}

/// The driver of a split ring.
#[derive(Debug)]
pub(super) struct SplitLoad {
    areas: Areas,
    setup: Setup,
    ids: Ids,
    next_avail: u16,
    shown: u16,
    next_used: u16,
    /// The device's index as read last.
    known_used: u16,
}

impl SplitLoad {
    /// Where the device says for which chain it wants a kick.
    fn avail_event_at(&self) -> usize {
        4 + 8 * usize::from(self.setup.size)
    }

    /// The place in either ring where an index points to.
    #[inline]
    fn place(&self, index: u16) -> usize {
        usize::from(index & (self.setup.size - 1))
    }

    #[inline]
    fn make_available(&mut self, id: u16) {
        let place = 4 + 2 * self.place(self.next_avail);
        if self.areas.driver.load16(place) != id {
            self.areas.driver.store16(place, id);
        }
        self.ids.in_flight[usize::from(id)] = true;
        self.next_avail = self.next_avail.wrapping_add(1);
    }
}

impl LoadRing for SplitLoad {
    type Format = Split;

    fn new(ram: &Arc<GuestRam>, setup: &Setup) -> Result<SplitLoad, MemoryError> {
        let [desc, driver, device] = setup.at;
        let areas = Areas::find::<Split>(ram, setup.size, desc, driver, device)?;
        // NO_INTERRUPT; with EVENT_IDX an event that comes once in 2^16 chains.
        areas.driver.store16(0, 1);
        let used_event_at = 4 + 2 * usize::from(setup.size);
        areas.driver.store16(used_event_at, u16::MAX);
        Ok(SplitLoad {
            areas,
            setup: *setup,
            ids: Ids::new(setup),
            next_avail: 0,
            shown: 0,
            next_used: 0,
            known_used: 0,
        })
    }

    fn ids(&mut self) -> &mut Ids {
        &mut self.ids
    }

    #[inline]
    fn post(&mut self, id: u16, addr: u64, len: u32) {
        let flags = if self.setup.write { Desc::WRITE } else { 0 };
        let rest = u64::from(len) | (u64::from(flags) << 32);
        let at = usize::from(id) * 16;
        if self.areas.desc.load64(at + 8) != rest || self.areas.desc.load64(at) != addr {
            self.areas.desc.store64(at, addr);
            self.areas.desc.store64(at + 8, rest);
        }
        self.make_available(id);
    }

    /// The head of a chain is the descriptor with the number of its id; the others of all chains
    /// stand behind the heads.
    fn set_chain(&mut self, id: u16, buffers: &[Buffer]) {
        let behind = self.ids.size + id * (self.setup.chain - 1);
        let mut slot = id;
        for (index, buffer) in (0u16..).zip(buffers) {
            let next = behind + index;
            let last = usize::from(index) + 1 == buffers.len();
            let flags = buffer.flags | if last { 0 } else { Desc::NEXT };
            let link = if last { 0 } else { u64::from(next) };
            let at = usize::from(slot) * 16;
            let rest = u64::from(buffer.len) | (u64::from(flags) << 32) | (link << 48);
            self.areas.desc.store64(at, buffer.addr);
            self.areas.desc.store64(at + 8, rest);
            slot = next;
        }
    }

    #[inline]
    fn post_chain(&mut self, id: u16) {
        self.make_available(id);
    }

    fn table_entry(index: u16, count: u16, buffer: &Buffer) -> [u64; 2] {
        let last = index + 1 == count;
        let flags = buffer.flags | if last { 0 } else { Desc::NEXT };
        let next = if last { 0 } else { index + 1 };
        let rest = u64::from(buffer.len) | (u64::from(flags) << 32) | (u64::from(next) << 48);
        [buffer.addr, rest]
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.shown == self.next_avail {
            return false;
        }
        let old = core::mem::replace(&mut self.shown, self.next_avail);
        self.areas.driver.store16_release(2, self.next_avail);
        // Pairs with the fence of a device between asking for kicks and looking at the index.
        fence(Ordering::SeqCst);
        if self.setup.event_idx {
            let event = self.areas.device.load16(self.avail_event_at());
            return need_event(event, self.next_avail, old);
        }
        self.areas.device.load16(0) & 1 == 0
    }

    #[inline]
    fn used(&mut self) -> Result<Option<(u16, u32)>, NotInFlight> {
        if self.ids.batch.is_some() {
            return self.ids.next_of_batch();
        }
        if self.known_used == self.next_used {
            self.known_used = self.areas.device.load16_acquire(2);
            if self.known_used == self.next_used {
                return Ok(None);
            }
        }
        let at = 4 + 8 * self.place(self.next_used);
        let word = self.areas.device.load32(at);
        let written = self.areas.device.load32(at + 4);
        if self.setup.in_order {
            let count = self.ids.begin_batch(word, written)?;
            self.next_used = self.next_used.wrapping_add(count);
            return self.ids.next_of_batch();
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((self.ids.come_back(word)?, written)))
    }
}

/// The driver of a packed ring.
#[derive(Debug)]
pub(super) struct PackedLoad {
    areas: Areas,
    setup: Setup,
    ids: Ids,
    next_avail: PackedCursor,
    /// Where the chains not shown yet begin, and the word of the first, which is held back.
    shown: PackedCursor,
    held: Option<(usize, u64)>,
    next_used: PackedCursor,
    /// What the device overwrites in the ring, to write it again.
    chains: Box<[PackedChain]>,
}

/// A chain made beforehand: addresses, and words that lack id and lap.
#[derive(Debug, Clone, Copy, Default)]
struct PackedChain {
    words: [[u64; 2]; CHAIN_MAX],
    count: u16,
}

impl PackedLoad {
    #[inline]
    fn put(&mut self, addr: u64, word: u64) {
        let at = usize::from(self.next_avail.slot) * 16;
        self.areas.desc.store64(at, addr);
        // The flags make a chain available: those of the first of a burst come last.
        if self.held.is_none() {
            self.held = Some((at + 8, word));
        } else {
            self.areas.desc.store64_release(at + 8, word);
        }
        self.next_avail.advance(1, self.setup.size);
    }

    /// The flags of this lap, in place, and the id.
    #[inline]
    fn lap_and_id(&self, id: u16) -> u64 {
        let lap = if self.next_avail.wrap { AVAIL } else { USED };
        (u64::from(lap) << 48) | (u64::from(id) << 32)
    }
}

impl LoadRing for PackedLoad {
    type Format = Packed;

    fn new(ram: &Arc<GuestRam>, setup: &Setup) -> Result<PackedLoad, MemoryError> {
        let [desc, driver, device] = setup.at;
        let areas = Areas::find::<Packed>(ram, setup.size, desc, driver, device)?;
        // RING_EVENT_FLAGS_DISABLE.
        areas.driver.store32(0, 1 << 16);
        let start = PackedCursor {
            slot: 0,
            wrap: true,
        };
        Ok(PackedLoad {
            areas,
            setup: *setup,
            ids: Ids::new(setup),
            next_avail: start,
            shown: start,
            held: None,
            next_used: start,
            chains: vec![PackedChain::default(); usize::from(setup.ids())].into(),
        })
    }

    fn ids(&mut self) -> &mut Ids {
        &mut self.ids
    }

    #[inline]
    fn post(&mut self, id: u16, addr: u64, len: u32) {
        let flags = if self.setup.write { Desc::WRITE } else { 0 };
        let word = u64::from(len) | (u64::from(flags) << 48) | self.lap_and_id(id);
        self.ids.in_flight[usize::from(id)] = true;
        self.put(addr, word);
    }

    fn set_chain(&mut self, id: u16, buffers: &[Buffer]) {
        let chain = &mut self.chains[usize::from(id)];
        chain.count = 0;
        for (place, buffer) in chain.words.iter_mut().zip(buffers) {
            chain.count += 1;
            let last = usize::from(chain.count) == buffers.len();
            let flags = buffer.flags | if last { 0 } else { Desc::NEXT };
            *place = [
                buffer.addr,
                u64::from(buffer.len) | (u64::from(flags) << 48),
            ];
        }
    }

    /// Every descriptor carries the id; only the last one's counts (VIRTIO 1.3 §2.8.6).
    #[inline]
    fn post_chain(&mut self, id: u16) {
        let chain = self.chains[usize::from(id)];
        for [addr, word] in &chain.words[..usize::from(chain.count)] {
            self.put(*addr, *word | self.lap_and_id(id));
        }
        self.ids.in_flight[usize::from(id)] = true;
    }

    /// Entries follow on each other without a link (VIRTIO 1.3 §2.8.7).
    fn table_entry(_: u16, _: u16, buffer: &Buffer) -> [u64; 2] {
        let rest = u64::from(buffer.len) | (u64::from(buffer.flags) << 48);
        [buffer.addr, rest]
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((at, word)) = self.held.take() else {
            return false;
        };
        self.areas.desc.store64_release(at, word);
        let old = core::mem::replace(&mut self.shown, self.next_avail);
        // Pairs with the fence of a device between asking for kicks and looking at the flags.
        fence(Ordering::SeqCst);
        let suppression = self.areas.device.load32(0);
        match (suppression >> 16) & 3 {
            1 => false,
            2 if self.setup.event_idx => {
                let event = PackedCursor::from_off_wrap((suppression & 0xffff) as u16);
                // A burst of a whole lap ends where it began.
                old == self.shown || packed_need_event(event, self.shown, old, self.setup.size)
            }
            _ => true,
        }
    }

    #[inline]
    fn used(&mut self) -> Result<Option<(u16, u32)>, NotInFlight> {
        if self.ids.batch.is_some() {
            return self.ids.next_of_batch();
        }
        let at = usize::from(self.next_used.slot) * 16 + 8;
        let word = self.areas.desc.load64_acquire(at);
        let flags = (word >> 48) & u64::from(AVAIL | USED);
        let ours = if self.next_used.wrap { AVAIL | USED } else { 0 };
        if flags != u64::from(ours) {
            return Ok(None);
        }
        #[expect(clippy::cast_possible_truncation, reason = "the fields of the word")]
        let (id, written) = ((word >> 32) as u32 & 0xffff, word as u32);
        if self.setup.in_order {
            let count = self.ids.begin_batch(id, written)?;
            self.next_used.advance(count, self.setup.size);
            return self.ids.next_of_batch();
        }
        let id = self.ids.come_back(id)?;
        let slots = self.chains[usize::from(id)].count.max(1);
        self.next_used.advance(slots, self.setup.size);
        Ok(Some((id, written)))
    }
}

#[cfg(test)]
mod tests;
