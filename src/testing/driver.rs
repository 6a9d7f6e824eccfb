//! The driver side of both ring formats: what a guest does with a virtqueue.
//!
//! Honest by default; the raw areas are there for tests that break the rules. Used by unit and
//! property tests, models and benches. One driver per virtqueue, on the same memory as the device
//! side under test.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::{Access, GuestRam, Segments, copy};
use crate::ring::event::{PackedCursor, need_event, packed_need_event};
use crate::ring::{Areas, Desc, Packed, RingConfig, RingFormat, Split, Virtqueue, VringBase};
use crate::sync::{Ordering, fence};

/// Offset between guest physical and front-end addresses in [`GuestRam::for_test`].
pub const UVA: u64 = 1 << 40;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

impl Buf {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Buf {
        Buf {
            addr,
            len,
            write: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Buf {
        Buf {
            addr,
            len,
            write: true,
        }
    }

    fn flags(&self, next: bool) -> u16 {
        let write = if self.write { Desc::WRITE } else { 0 };
        write | if next { Desc::NEXT } else { 0 }
    }
}

/// Which calls the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// None.
    Off,
    /// For every burst.
    On,
    /// With VIRTIO_F_EVENT_IDX: when the used element `n` places (split: elements, packed: slots)
    /// after the next one is there.
    After(u16),
}

/// Where a virtqueue lies in guest memory.
#[derive(Debug, Clone)]
pub struct RingMemory {
    /// The table that the addresses belong to.
    pub ram: Arc<GuestRam>,
    /// Number of descriptors.
    pub size: u16,
    /// Guest physical addresses of descriptor, driver and device area.
    pub at: [u64; 3],
}

impl RingMemory {
    /// Lays the three areas of a ring out from guest address `gpa` on.
    pub fn new<F: RingFormat>(ram: &Arc<GuestRam>, gpa: u64, size: u16) -> RingMemory {
        let bytes = F::area_bytes(size).map(|bytes| (bytes as u64).next_multiple_of(64));
        let at = [gpa, gpa + bytes[0], gpa + bytes[0] + bytes[1]];
        RingMemory {
            ram: Arc::clone(ram),
            size,
            at,
        }
    }

    /// The first guest address after the areas.
    pub fn end<F: RingFormat>(&self) -> u64 {
        self.at[2] + (F::area_bytes(self.size)[2] as u64).next_multiple_of(64)
    }

    /// Handles on the areas.
    ///
    /// # Panics
    /// When the areas are not in guest memory.
    pub fn areas<F: RingFormat>(&self) -> Areas {
        let [desc, driver, device] = self.at.map(|gpa| gpa + UVA);
        Areas::find::<F>(&self.ram, self.size, desc, driver, device).expect("areas in guest memory")
    }

    /// The device side, fresh.
    ///
    /// # Panics
    /// When the ring is impossible.
    pub fn device<F: RingFormat>(&self, event_idx: bool) -> Virtqueue<F> {
        self.device_at(event_idx, VringBase::fresh(F::PACKED))
    }

    /// The device side of a ring that stands at `base`.
    ///
    /// # Panics
    /// When the ring is impossible.
    pub fn device_at<F: RingFormat>(&self, event_idx: bool, base: VringBase) -> Virtqueue<F> {
        self.device_with(&RingConfig {
            event_idx,
            base,
            ..self.config::<F>()
        })
    }

    /// A fresh ring with indirect descriptors and no other feature.
    pub fn config<F: RingFormat>(&self) -> RingConfig {
        RingConfig {
            size: self.size,
            event_idx: false,
            indirect: true,
            in_order: false,
            readable_only: false,
            base: VringBase::fresh(F::PACKED),
        }
    }

    /// The device side, set up like this.
    ///
    /// # Panics
    /// When the ring is impossible.
    pub fn device_with<F: RingFormat>(&self, config: &RingConfig) -> Virtqueue<F> {
        Virtqueue::new(Arc::clone(&self.ram), self.areas::<F>(), config).expect("a legal ring")
    }
}

/// The driver side of one virtqueue, of either format.
pub trait Driver: Sized + core::fmt::Debug {
    /// The device side's format.
    type Format: RingFormat;

    /// The driver of a fresh ring.
    fn new(memory: &RingMemory, event_idx: bool) -> Self {
        Self::standing_at(memory, event_idx, VringBase::fresh(Self::Format::PACKED))
    }

    /// The driver of a ring that stands at `base` with nothing in flight, as after many laps.
    fn standing_at(memory: &RingMemory, event_idx: bool, base: VringBase) -> Self;

    /// VIRTIO_F_IN_ORDER was negotiated: one used element or descriptor may stand for many chains.
    /// Before the first chain.
    fn set_in_order(&mut self, in_order: bool);

    /// Writes a chain of direct descriptors. Returns its id, or `None` when the ring is full.
    /// Nothing is available before [`Driver::publish`].
    fn add(&mut self, bufs: &[Buf]) -> Option<u16> {
        let descs: Vec<_> = bufs.iter().map(|buf| (*buf, 0)).collect();
        self.add_raw(&descs)
    }

    /// Writes a chain with extra descriptor flags, as no honest driver would.
    fn add_raw(&mut self, descs: &[(Buf, u16)]) -> Option<u16>;

    /// Writes `bufs` as an indirect table at guest address `table`, and one descriptor for it.
    fn add_indirect(&mut self, bufs: &[Buf], table: u64) -> Option<u16> {
        let entries = Self::table(bufs);
        write_words(self.memory(), table, &entries);
        let len = u32::try_from(entries.len() * 16).ok()?;
        self.add_raw(&[(Buf::readable(table, len), Desc::INDIRECT)])
    }

    /// The entries of an indirect table for `bufs`.
    fn table(bufs: &[Buf]) -> Vec<[u64; 2]>;

    /// Makes everything written available. Returns whether the device wants a kick for it.
    fn publish(&mut self) -> bool;

    /// The next used element: id and length.
    fn used(&mut self) -> Option<(u16, u32)>;

    /// Asks for calls.
    fn set_calls(&mut self, calls: Calls);

    /// Where the ring lies.
    fn memory(&self) -> &RingMemory;

    /// The areas, to write what an honest driver would not.
    fn raw(&self) -> &Areas;
}

/// Writes 16-byte entries to guest memory.
fn write_words(memory: &RingMemory, gpa: u64, entries: &[[u64; 2]]) {
    let bytes: Vec<u8> = entries
        .iter()
        .flatten()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    write_guest(&memory.ram, gpa, &bytes);
}

/// Writes bytes to guest memory.
///
/// # Panics
/// When the range is not mapped.
pub fn write_guest(ram: &GuestRam, gpa: u64, bytes: &[u8]) {
    let mut segments = Segments::with_capacity(16);
    let len = u32::try_from(bytes.len()).expect("a short range");
    ram.translate(gpa, len, Access::Write, &mut segments)
        .expect("mapped guest memory");
    assert_eq!(copy::write(segments.as_slice(), 0, bytes), bytes.len());
}

/// Reads bytes from guest memory.
///
/// # Panics
/// When the range is not mapped.
pub fn read_guest(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
    let mut segments = Segments::with_capacity(16);
    let count = u32::try_from(len).expect("a short range");
    ram.translate(gpa, count, Access::Read, &mut segments)
        .expect("mapped guest memory");
    let mut bytes = vec![0; len];
    assert_eq!(copy::read(segments.as_slice(), 0, &mut bytes), len);
    bytes
}

/// The driver of a split ring.
#[derive(Debug)]
pub struct SplitDriver {
    memory: RingMemory,
    raw: Areas,
    event_idx: bool,
    /// Taken from the end; with `in_order` from the front, which keeps them in ring order.
    free: VecDeque<u16>,
    /// Descriptors of each chain, by head.
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    shown: u16,
    next_used: u16,
    in_order: bool,
    /// With `in_order`: heads in flight, oldest first.
    order: VecDeque<u16>,
    /// The last chain that the used element read last stands for, until it was given out.
    batch: Option<u16>,
}

impl SplitDriver {
    fn ring_slot(&self, index: u16) -> usize {
        usize::from(index % self.memory.size)
    }

    /// Takes back the chain `head`, the next in the used ring.
    fn release(&mut self, head: u16) {
        self.next_used = self.next_used.wrapping_add(1);
        let slots = core::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!slots.is_empty(), "used id {head} was not in flight");
        self.free.extend(slots);
    }
}

/// The chain whose turn it is, where a used element or descriptor names `last`: the last one that
/// it stands for, which is also returned when that is another.
fn first_in_order(order: &mut VecDeque<u16>, last: u16, written: u32) -> (u16, Option<u16>) {
    let first = order.pop_front().expect("in flight");
    if first == last {
        return (first, None);
    }
    assert!(order.contains(&last), "used id {last} in its turn");
    assert_eq!(written, 0, "what was written is told of each chain");
    (first, Some(last))
}

impl Driver for SplitDriver {
    type Format = Split;

    fn standing_at(memory: &RingMemory, event_idx: bool, base: VringBase) -> SplitDriver {
        let raw = memory.areas::<Split>();
        if base != VringBase::fresh(false) {
            raw.driver.store16(2, base.avail);
            raw.device.store16(2, base.avail);
        }
        SplitDriver {
            memory: memory.clone(),
            raw,
            event_idx,
            free: (0..memory.size).rev().collect(),
            chains: vec![Vec::new(); usize::from(memory.size)],
            next_avail: base.avail,
            shown: base.avail,
            next_used: base.avail,
            in_order: false,
            order: VecDeque::new(),
            batch: None,
        }
    }

    fn set_in_order(&mut self, in_order: bool) {
        self.in_order = in_order;
        if in_order {
            // VIRTIO 1.3 §2.7.5: from offset 0 on, wrapping around at the end of the table.
            self.free = (0..self.memory.size).collect();
        }
    }

    fn add_raw(&mut self, descs: &[(Buf, u16)]) -> Option<u16> {
        let rest = self.free.len().checked_sub(descs.len())?;
        let slots: Vec<u16> = match self.in_order {
            true => self.free.drain(..descs.len()).collect(),
            false => self.free.drain(rest..).collect(),
        };
        for (i, (buf, extra)) in descs.iter().enumerate() {
            let next = slots.get(i + 1).copied();
            let flags = buf.flags(next.is_some()) | extra;
            let rest = u64::from(buf.len)
                | (u64::from(flags) << 32)
                | (u64::from(next.unwrap_or(0)) << 48);
            self.raw.desc.store64(usize::from(slots[i]) * 16, buf.addr);
            self.raw.desc.store64(usize::from(slots[i]) * 16 + 8, rest);
        }
        let head = slots[0];
        self.raw
            .driver
            .store16(4 + 2 * self.ring_slot(self.next_avail), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.chains[usize::from(head)] = slots;
        if self.in_order {
            self.order.push_back(head);
        }
        Some(head)
    }

    fn table(bufs: &[Buf]) -> Vec<[u64; 2]> {
        let entry = |(i, buf): (usize, &Buf)| {
            let more = i + 1 < bufs.len();
            let next = if more { (i + 1) as u64 } else { 0 };
            let flags = u64::from(buf.flags(more));
            [buf.addr, u64::from(buf.len) | (flags << 32) | (next << 48)]
        };
        bufs.iter().enumerate().map(entry).collect()
    }

    fn publish(&mut self) -> bool {
        let old = core::mem::replace(&mut self.shown, self.next_avail);
        self.raw.driver.store16_release(2, self.next_avail);
        // The driver's half of the fence pair in `Split::set_kicks`.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .raw
                .device
                .load16(4 + 8 * usize::from(self.memory.size));
            return need_event(event, self.next_avail, old);
        }
        self.raw.device.load16(0) & 1 == 0
    }

    fn used(&mut self) -> Option<(u16, u32)> {
        let more = self.raw.device.load16_acquire(2) != self.next_used;
        if let Some(last) = self.batch {
            assert!(more, "the index moves by the whole batch");
            let id = self.order.pop_front().expect("a chain of the batch");
            self.batch = (id != last).then_some(last);
            self.release(id);
            return Some((id, 0));
        }
        if !more {
            return None;
        }
        let at = 4 + 8 * self.ring_slot(self.next_used);
        let mut id = u16::try_from(self.raw.device.load32(at)).expect("a used id of 16 bits");
        let written = self.raw.device.load32(at + 4);
        if self.in_order {
            (id, self.batch) = first_in_order(&mut self.order, id, written);
        }
        self.release(id);
        Some((id, written))
    }

    fn set_calls(&mut self, calls: Calls) {
        if let (Calls::After(n), true) = (calls, self.event_idx) {
            let at = 4 + 2 * usize::from(self.memory.size);
            self.raw.driver.store16(at, self.next_used.wrapping_add(n));
        } else if self.event_idx {
            let off = self.next_used.wrapping_sub(1);
            let event = if calls == Calls::Off {
                off
            } else {
                self.next_used
            };
            self.raw
                .driver
                .store16(4 + 2 * usize::from(self.memory.size), event);
        } else {
            self.raw.driver.store16(0, u16::from(calls == Calls::Off));
        }
        // The driver's half of the fence pair in `Split::wants_call`.
        fence(Ordering::SeqCst);
    }

    fn memory(&self) -> &RingMemory {
        &self.memory
    }

    fn raw(&self) -> &Areas {
        &self.raw
    }
}

/// The driver of a packed ring.
#[derive(Debug)]
pub struct PackedDriver {
    memory: RingMemory,
    raw: Areas,
    event_idx: bool,
    free: Vec<u16>,
    /// Slots that each id in flight takes; 0 when it is not in flight.
    slots: Vec<u16>,
    room: u16,
    next_avail: PackedCursor,
    /// Where the chains not shown yet begin, and the word of the first head, which is held back.
    shown: PackedCursor,
    held: Option<(usize, u64)>,
    next_used: PackedCursor,
    in_order: bool,
    /// With `in_order`: ids in flight, oldest first.
    order: VecDeque<u16>,
    /// The last chain that the used descriptor read last stands for, until it was given out.
    batch: Option<u16>,
}

impl PackedDriver {
    /// Takes back the chain `id`, the next in the ring.
    fn release(&mut self, id: u16) {
        let count = core::mem::take(&mut self.slots[usize::from(id)]);
        assert!(count > 0, "used id {id} was not in flight");
        self.next_used.advance(count, self.memory.size);
        self.room += count;
        self.free.push(id);
    }
}

impl Driver for PackedDriver {
    type Format = Packed;

    fn standing_at(memory: &RingMemory, event_idx: bool, base: VringBase) -> PackedDriver {
        let start = PackedCursor::from_off_wrap(base.avail);
        let raw = memory.areas::<Packed>();
        // Used in this lap below the cursor, and in the lap before from it on.
        for slot in 0..memory.size {
            let lap = start.wrap == (slot < start.slot);
            if lap {
                let word = u64::from(AVAIL | USED) << 48;
                raw.desc.store64(usize::from(slot) * 16 + 8, word);
            }
        }
        PackedDriver {
            memory: memory.clone(),
            raw,
            event_idx,
            free: (0..memory.size).rev().collect(),
            slots: vec![0; usize::from(memory.size)],
            room: memory.size,
            next_avail: start,
            shown: start,
            held: None,
            next_used: start,
            in_order: false,
            order: VecDeque::new(),
            batch: None,
        }
    }

    fn set_in_order(&mut self, in_order: bool) {
        self.in_order = in_order;
    }

    fn add_raw(&mut self, descs: &[(Buf, u16)]) -> Option<u16> {
        let count = u16::try_from(descs.len()).ok()?;
        if count > self.room {
            return None;
        }
        let id = self.free.pop()?;
        self.room -= count;
        self.slots[usize::from(id)] = count;
        if self.in_order {
            self.order.push_back(id);
        }
        let mut head = None;
        for (i, (buf, extra)) in descs.iter().enumerate() {
            let lap = if self.next_avail.wrap { AVAIL } else { USED };
            let flags = buf.flags(i + 1 < descs.len()) | extra | lap;
            let word = u64::from(buf.len) | (u64::from(id) << 32) | (u64::from(flags) << 48);
            let at = usize::from(self.next_avail.slot) * 16;
            self.raw.desc.store64(at, buf.addr);
            // The head's flags make the chain available: they come last, and those of the first
            // chain of a burst when the burst is published.
            if i == 0 {
                head = Some((at + 8, word));
            } else {
                self.raw.desc.store64(at + 8, word);
            }
            self.next_avail.advance(1, self.memory.size);
        }
        match (self.held, head) {
            (None, head) => self.held = head,
            (Some(_), Some((at, word))) => self.raw.desc.store64_release(at, word),
            (Some(_), None) => {}
        }
        Some(id)
    }

    fn table(bufs: &[Buf]) -> Vec<[u64; 2]> {
        let entry = |buf: &Buf| {
            let flags = u64::from(buf.flags(false));
            [buf.addr, u64::from(buf.len) | (flags << 48)]
        };
        bufs.iter().map(entry).collect()
    }

    fn publish(&mut self) -> bool {
        let Some((at, word)) = self.held.take() else {
            return false;
        };
        self.raw.desc.store64_release(at, word);
        let old = core::mem::replace(&mut self.shown, self.next_avail);
        // The driver's half of the fence pair in `Packed::set_kicks`.
        fence(Ordering::SeqCst);
        let suppression = self.raw.device.load32(0);
        match (suppression >> 16) & 3 {
            1 => false,
            2 if self.event_idx => {
                let event = PackedCursor::from_off_wrap((suppression & 0xffff) as u16);
                old == self.shown || packed_need_event(event, self.shown, old, self.memory.size)
            }
            _ => true,
        }
    }

    fn used(&mut self) -> Option<(u16, u32)> {
        if let Some(last) = self.batch {
            let id = self.order.pop_front().expect("a chain of the batch");
            self.batch = (id != last).then_some(last);
            self.release(id);
            return Some((id, 0));
        }
        let at = usize::from(self.next_used.slot) * 16 + 8;
        let word = self.raw.desc.load64_acquire(at);
        let flags = u16::try_from(word >> 48).expect("16 bits");
        let wrap = self.next_used.wrap;
        if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
            return None;
        }
        let mut id = u16::try_from((word >> 32) & 0xffff).expect("16 bits");
        let written = u32::try_from(word & 0xffff_ffff).expect("32 bits");
        if self.in_order {
            (id, self.batch) = first_in_order(&mut self.order, id, written);
        }
        self.release(id);
        Some((id, written))
    }

    fn set_calls(&mut self, calls: Calls) {
        let word = match calls {
            Calls::Off => 1 << 16,
            Calls::On => 0,
            Calls::After(n) => {
                let mut event = self.next_used;
                event.advance(n, self.memory.size);
                u32::from(event.off_wrap()) | (2 << 16)
            }
        };
        self.raw.driver.store32(0, word);
        // The driver's half of the fence pair in `Packed::wants_call`.
        fence(Ordering::SeqCst);
    }

    fn memory(&self) -> &RingMemory {
        &self.memory
    }

    fn raw(&self) -> &Areas {
        &self.raw
    }
}
