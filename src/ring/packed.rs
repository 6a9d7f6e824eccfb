//! The packed format: one ring of descriptors that both sides write (VIRTIO 1.3 §2.8).
//!
//! The second word of a descriptor (len, id, flags) is always accessed as one 64-bit word: one load
//! sees all three together, one store shows a used element. Layout and index arithmetic only; the
//! walk and every limit on it are in `virtqueue.rs`.

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::memory::Area;
use crate::sync::{Ordering, fence};

use super::event::{PackedCursor, packed_need_event};
use super::format::{Areas, Desc, Head, RingConfig, RingFormat, SIZE_MAX, VringBase};
use super::{ChainId, RingFault, Single};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// Descriptors that [`Packed::backlog`] goes on by: as many as drivers like to add at a time.
const BACKLOG_STEP: u16 = 32;

/// The first used element of a burst, held back until the burst is published.
#[derive(Debug, Clone, Copy)]
struct Held {
    offset: usize,
    word: u64,
}

/// Chains used in a row that nothing was written to: with VIRTIO_F_IN_ORDER one used descriptor, at
/// the place of the first and with the buffer id of the last, stands for all (VIRTIO 1.3 §2.8.8).
/// Every line of used descriptors that is not written stays with the driver.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    id: u16,
    slots: u16,
    chains: u16,
}

/// Chains that one used descriptor stands for at most: drivers that clean up a ring in steps of
/// their own bursts must find an end there.
const RUN_MAX: u16 = 32;

/// What base 0 says: an even lap begins.
const EVEN_LAP: PackedCursor = PackedCursor {
    slot: 0,
    wrap: false,
};

/// Whether no descriptor of a ring was ever used. libblkio's driver says base 0 for such a ring,
/// which is in its first lap; in earnest that is where an even lap begins with nothing in flight.
///
/// In the first lap the driver leaves USED clear everywhere. Where an even lap begins it is set
/// somewhere: the last used descriptor lies in the lap before, since no chain and no run of chains
/// is longer than the ring, and what the driver made of it since has the bit too. It need not lie
/// in slot 0: one used descriptor stands for all slots of a chain or of a run, and the others keep
/// what the driver wrote, which may be of an odd lap.
fn is_fresh(desc: &Area, size: u16) -> bool {
    (0..size).all(|slot| (desc.load64(Packed::word_at(slot)) >> 48) as u16 & USED == 0)
}

/// Descriptors in a cache line.
const DESCS_PER_LINE: u16 = 4;

/// The device's side of one packed ring.
#[derive(Debug)]
pub struct Packed {
    areas: Areas,
    size: u16,
    event_idx: bool,
    /// Next descriptor to pop, with the driver's wrap counter.
    next_avail: PackedCursor,
    /// Next descriptor to write as used, with the device's wrap counter.
    next_used: PackedCursor,
    /// `next_used` when the driver was last asked whether it wants a call.
    signalled: PackedCursor,
    /// Used descriptors written or held since then (a full lap leaves the cursors equal).
    unsignalled: bool,
    held: Option<Held>,
    in_order: bool,
    run: Run,
    /// Descriptors from `next_avail` on of which it is known that they are available.
    known: u16,
}

impl Packed {
    /// Byte offset of the second word of the descriptor in `slot`.
    #[inline]
    fn word_at(slot: u16) -> usize {
        usize::from(slot) * 16 + 8
    }

    #[inline]
    fn is_available(word: u64, wrap: bool) -> bool {
        let flags = (word >> 48) as u16;
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == wrap && used != wrap
    }

    /// Whether `word` is that of an available chain of one descriptor, device-writable or not as
    /// `writable` says, on the lap of `wrap`.
    #[inline(always)]
    fn is_single(word: u64, wrap: bool, writable: bool) -> bool {
        let lap = if wrap { AVAIL } else { USED };
        let direction = if writable { Desc::WRITE } else { 0 };
        let flags = AVAIL | USED | Desc::NEXT | Desc::INDIRECT | Desc::WRITE;
        (word >> 48) as u16 & flags == lap | direction
    }

    /// Whether the descriptor `slots` after the next one says that it is available.
    #[inline]
    fn is_available_ahead(&self, slots: u16) -> bool {
        let mut at = self.next_avail;
        at.advance(slots, self.size);
        Packed::is_available(self.areas.desc.load64(Packed::word_at(at.slot)), at.wrap)
    }

    /// The second word of a used descriptor.
    #[inline(always)]
    fn used_word(id: u16, written: u32, wrap: bool) -> u64 {
        let flags = if wrap { AVAIL | USED } else { 0 };
        // WRITE says that `len` counts (VIRTIO 1.3 §2.8.4).
        let flags = flags | if written > 0 { Desc::WRITE } else { 0 };
        u64::from(written) | (u64::from(id) << 32) | (u64::from(flags) << 48)
    }

    /// Writes one used descriptor for `slots` slots, the last chain of which has the buffer `id`.
    #[inline(always)]
    fn write_used(&mut self, id: u16, slots: u16, written: u32) {
        let word = Packed::used_word(id, written, self.next_used.wrap);
        let offset = Packed::word_at(self.next_used.slot);
        if self.held.is_none() {
            self.held = Some(Held { offset, word });
        } else {
            // The driver looks at the first slot of the burst before this one, and finds it unused.
            self.areas.desc.store64(offset, word);
        }
        self.next_used.advance(slots, self.size);
    }

    /// Ends the run of chains that one used descriptor stands for.
    #[inline]
    fn end_run(&mut self) {
        if self.run.chains > 0 {
            let Run { id, slots, .. } = core::mem::take(&mut self.run);
            self.write_used(id, slots, 0);
        }
    }

    /// Asks for the line of descriptors after the next one: a chain of several is walked one by
    /// one, and what comes behind it is not seen coming.
    #[inline]
    fn prefetch_ahead(&self) {
        let mut at = self.next_avail;
        at.advance(DESCS_PER_LINE.min(self.size - 1), self.size);
        self.areas.desc.prefetch(16 * usize::from(at.slot));
    }

    /// The next descriptor, if it is the available head of a chain.
    #[inline(always)]
    fn load_head(&self) -> Option<Head> {
        let (desc, at) = (&self.areas.desc, self.next_avail);
        let slot = at.slot;
        // Acquire: pairs with the driver's write barrier before it stores the flags of the head
        // (VIRTIO 1.3 §2.8.6). Without it the address, or the rest of the chain, could be read from
        // before it was written.
        let word = desc.load64_acquire(Packed::word_at(slot));
        if !Packed::is_available(word, at.wrap) {
            return None;
        }
        let addr = desc.load64(usize::from(slot) * 16);
        Some(Head {
            slot,
            desc: Packed::decode([addr, word]),
        })
    }
}

impl RingFormat for Packed {
    const PACKED: bool = true;
    const DRIVER_ALIGN: usize = 4;

    fn area_bytes(size: u16) -> [usize; 3] {
        [16 * usize::from(size), 4, 4]
    }

    fn new(areas: Areas, config: &RingConfig) -> Result<Packed, RingFault> {
        let size = config.size;
        if size == 0 || size > SIZE_MAX {
            return Err(RingFault::Size);
        }
        let bytes = Packed::area_bytes(size);
        let lens = [areas.desc.len(), areas.driver.len(), areas.device.len()];
        if lens.iter().zip(bytes).any(|(&len, need)| len < need) {
            return Err(RingFault::Areas);
        }
        let mut next_avail = PackedCursor::from_off_wrap(config.base.avail);
        let mut next_used = PackedCursor::from_off_wrap(config.base.used);
        if next_avail == EVEN_LAP && next_used == EVEN_LAP && is_fresh(&areas.desc, size) {
            next_avail.wrap = true;
            next_used.wrap = true;
        }
        if next_avail.slot >= size || next_used.slot >= size {
            return Err(RingFault::Base);
        }
        Ok(Packed {
            areas,
            size,
            event_idx: config.event_idx,
            next_avail,
            next_used,
            signalled: next_used,
            unsignalled: false,
            held: None,
            in_order: config.in_order,
            run: Run::default(),
            known: 0,
        })
    }

    #[inline(always)]
    fn peek(&mut self) -> Result<Option<Head>, RingFault> {
        Ok(self.load_head())
    }

    #[inline]
    fn available(&mut self) -> Result<u16, RingFault> {
        Ok(u16::from(self.load_head().is_some()))
    }

    #[inline]
    fn backlog(&mut self, want: u16) -> u16 {
        let want = want.min(self.size);
        while self.known < want {
            // The last descriptor of a step, not the first one that is missing: that one's line is
            // being filled by the driver, and taking it away slows the driver down.
            let step = (want - self.known).min(BACKLOG_STEP);
            if !self.is_available_ahead(self.known + step - 1) {
                break;
            }
            self.known += step;
        }
        if self.known == 0 && self.is_available_ahead(0) {
            self.known = 1;
        }
        self.known
    }

    #[inline]
    fn next(&self, slot: u16, _desc: &Desc) -> Result<Head, RingFault> {
        // The flags of later descriptors in a chain say nothing about availability: the head's do
        // for all (VIRTIO 1.3 §2.8.6).
        let slot = if slot + 1 == self.size { 0 } else { slot + 1 };
        let at = usize::from(slot) * 16;
        let words = [self.areas.desc.load64(at), self.areas.desc.load64(at + 8)];
        Ok(Head {
            slot,
            desc: Packed::decode(words),
        })
    }

    #[inline]
    fn next_indirect(index: u32, len: u32, _desc: &Desc) -> Result<Option<u32>, RingFault> {
        // VIRTIO 1.3 §2.8.7: the table is read in order to its end, NEXT is reserved.
        Ok(Some(index + 1).filter(|&next| next < len))
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields of one 64-bit word")]
    fn decode(words: [u64; 2]) -> Desc {
        // VIRTIO 1.3 §2.8.13: addr; len, id, flags.
        let [addr, rest] = words;
        Desc {
            addr,
            len: rest as u32,
            id: (rest >> 32) as u16,
            flags: (rest >> 48) as u16,
        }
    }

    #[inline]
    fn take(&mut self, _head: u16, slots: u16, last: &Desc) -> ChainId {
        self.next_avail.advance(slots, self.size);
        self.known = self.known.saturating_sub(slots);
        if slots > 1 {
            self.prefetch_ahead();
        }
        // The buffer id stands in the last descriptor of the chain (VIRTIO 1.3 §2.8.6).
        ChainId::new(last.id, slots)
    }

    #[inline]
    fn take_singles(
        &mut self,
        writable: bool,
        out: &mut [Single],
        mut made: impl FnMut(ChainId, &Desc) -> Option<Single>,
    ) -> usize {
        let mut next = self.next_avail;
        let mut taken = 0;
        // Up to the ring's end, and from its start.
        while taken < out.len() {
            let stretch = usize::from(self.size - next.slot).min(out.len() - taken);
            let descs = self
                .areas
                .desc
                .pairs64(16 * usize::from(next.slot), stretch);
            let mut here = 0;
            for (pair, place) in descs.iter().zip(&mut out[taken..]) {
                // Acquire: as in `load_head`.
                let word = pair.second_acquire();
                if !Packed::is_single(word, next.wrap, writable) {
                    break;
                }
                let desc = Packed::decode([pair.first(), word]);
                let Some(single) = made(ChainId::new(desc.id, 1), &desc) else {
                    break;
                };
                *place = single;
                here += 1;
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
            next.advance(here as u16, self.size);
            taken += here;
            if here < stretch {
                break;
            }
        }
        self.next_avail = next;
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        {
            self.known = self.known.saturating_sub(taken as u16);
        }
        taken
    }

    #[inline]
    fn untake(&mut self, chain: &ChainId) {
        self.next_avail.retreat(chain.slots(), self.size);
        self.known = 0;
    }

    #[inline(always)]
    fn put_used(&mut self, chain: &ChainId, written: u32) {
        self.unsignalled = true;
        if self.in_order && written == 0 {
            // A driver that gives descriptors again before it was told that they are used could
            // make the run longer than the ring.
            if chain.slots() > self.size - self.run.slots {
                self.end_run();
            }
            self.run.id = chain.id();
            self.run.slots += chain.slots();
            self.run.chains += 1;
            if self.run.chains == RUN_MAX {
                self.end_run();
            }
            return;
        }
        self.end_run();
        self.write_used(chain.id(), chain.slots(), written);
    }

    #[inline]
    fn put_used_singles(&mut self, mut used: impl Iterator<Item = (u16, u32)>) {
        let Some((id, written)) = used.next() else {
            return;
        };
        self.put_used(&ChainId::new(id, 1), written);
        if self.in_order && written == 0 {
            // They may all go with the first one, by one element.
            used.for_each(|(id, written)| self.put_used(&ChainId::new(id, 1), written));
            return;
        }
        // The driver looks at the first slot of the burst, held back, before these.
        let mut used = used.fuse();
        loop {
            let (at, wrap) = (self.next_used, self.next_used.wrap);
            let stretch = usize::from(self.size - at.slot);
            let descs = self.areas.desc.pairs64(16 * usize::from(at.slot), stretch);
            let mut here = 0;
            for (pair, (id, written)) in descs.iter().zip(&mut used) {
                pair.set_second(Packed::used_word(id, written, wrap));
                here += 1;
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
            self.next_used.advance(here as u16, self.size);
            if here < stretch {
                break;
            }
        }
    }

    #[inline]
    fn publish(&mut self) {
        self.end_run();
        if let Some(held) = self.held.take() {
            // Release: the other used elements and the buffers must be visible before the first
            // element, which lets the driver go on to them (VIRTIO 1.3 §2.8.6).
            self.areas.desc.store64_release(held.offset, held.word);
        }
    }

    #[inline]
    fn wants_call(&mut self) -> bool {
        if !self.unsignalled {
            return false;
        }
        // Orders our used elements before the read of what the driver wants. Pairs with the full
        // barrier of the driver between writing its event suppression and looking at the ring
        // again. Without it the driver could sleep on a published element.
        fence(Ordering::SeqCst);
        let old = core::mem::replace(&mut self.signalled, self.next_used);
        self.unsignalled = false;
        let suppression = self.areas.driver.load32(0);
        match (suppression >> 16) & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                #[expect(clippy::cast_possible_truncation, reason = "off_wrap is the low half")]
                let event = PackedCursor::from_off_wrap(suppression as u16);
                old == self.next_used || packed_need_event(event, self.next_used, old, self.size)
            }
            _ => true,
        }
    }

    fn set_kicks(&mut self, wanted: bool) -> bool {
        let word = match (wanted, self.event_idx) {
            (false, _) => VRING_PACKED_EVENT_FLAG_DISABLE << 16,
            (true, false) => VRING_PACKED_EVENT_FLAG_ENABLE << 16,
            (true, true) => {
                u32::from(self.next_avail.off_wrap()) | (VRING_PACKED_EVENT_FLAG_DESC << 16)
            }
        };
        self.areas.device.store32(0, word);
        if !wanted {
            return false;
        }
        // Orders our request for kicks before the look at the next descriptor. Pairs with the full
        // barrier of the driver between making a chain available and reading our suppression.
        // Without it a chain could be added, unkicked, while we decide to sleep.
        fence(Ordering::SeqCst);
        self.load_head().is_some()
    }

    fn base(&self) -> VringBase {
        let mut used = self.next_used;
        used.advance(self.run.slots, self.size);
        VringBase {
            avail: self.next_avail.off_wrap(),
            used: used.off_wrap(),
        }
    }

    fn swap_areas(&mut self, areas: Areas) -> Areas {
        core::mem::replace(&mut self.areas, areas)
    }
}
