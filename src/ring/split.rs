//! The split format: descriptor table, available ring, used ring (VIRTIO 1.3 §2.7).
//!
//! Layout and index arithmetic only; the walk and every limit on it are in `virtqueue.rs`.

use crate::memory::Area;
use crate::sync::{Ordering, fence};

use super::event::need_event;
use super::format::{Areas, Desc, Head, RingConfig, RingFormat, SIZE_MAX, VringBase};
use super::{ChainId, RingFault, Single};

/// `flags`, `idx`, then the ring, in both rings.
const RING: usize = 4;
const IDX: usize = 2;
const FLAGS: usize = 0;

/// Descriptors that are fetched at a time: a burst.
const PREFETCH_CHAINS: u16 = 256;

/// Chains used in a row that nothing was written to: with VIRTIO_F_IN_ORDER one used element, in
/// the place of the first and with the head of the last, stands for all, and the index moves by all
/// of them (VIRTIO 1.3 §2.7.9). Every line of elements that is not written stays with the driver.
#[derive(Debug, Clone, Copy, Default)]
struct Batch {
    head: u16,
    chains: u16,
}

/// The bindings' constants have the width of C's int; the fields have 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "both flags are 1")]
mod flag {
    use virtio_bindings::virtio_ring as spec;

    pub(super) const NO_INTERRUPT: u16 = spec::VRING_AVAIL_F_NO_INTERRUPT as u16;
    pub(super) const NO_NOTIFY: u16 = spec::VRING_USED_F_NO_NOTIFY as u16;
}

/// The device's side of one split ring.
#[derive(Debug)]
pub struct Split {
    areas: Areas,
    size: u16,
    event_idx: bool,
    /// Index of the next chain to pop.
    next_avail: u16,
    /// The driver's `avail.idx` as last read: chains in `[next_avail, seen_avail)` are there.
    seen_avail: u16,
    /// Index after the last used chain, whether its element is written or stands in `batch`.
    next_used: u16,
    /// `next_used` when it was last published.
    published: u16,
    /// `next_used` when the driver was last asked whether it wants a call.
    signalled: u16,
    in_order: bool,
    /// The last chains before `next_used`, whose element is not written yet.
    batch: Batch,
}

impl Split {
    #[inline]
    fn mask(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    #[inline]
    fn desc(&self, slot: u16) -> Desc {
        let at = usize::from(slot) * 16;
        Split::decode([self.areas.desc.load64(at), self.areas.desc.load64(at + 8)])
    }

    /// Asks the CPU for the descriptors of the `count` chains that end at avail index `end`, the
    /// last of each line of four first: backwards, so that what the CPU fetches on its own account
    /// lies in lines that the driver is done with, not in those that it writes next.
    #[inline]
    fn prefetch(&self, end: u16, count: u16) {
        let mut back = 1;
        while back <= count.min(PREFETCH_CHAINS) {
            let slot = self
                .areas
                .driver
                .load16(RING + 2 * self.mask(end.wrapping_sub(back)));
            self.areas.desc.prefetch(16 * usize::from(slot));
            back += 4;
        }
    }

    /// Byte offset of `avail_event` (after the used ring) and of `used_event` (after the available
    /// ring), VIRTIO 1.3 §2.7.6, §2.7.8.
    fn avail_event_at(&self) -> usize {
        RING + 8 * usize::from(self.size)
    }

    fn used_event_at(&self) -> usize {
        RING + 2 * usize::from(self.size)
    }

    /// Ends the batch of chains that one used element stands for.
    #[inline]
    fn end_batch(&mut self) {
        let Batch { head, chains } = core::mem::take(&mut self.batch);
        if chains > 0 {
            let first = self.next_used.wrapping_sub(chains);
            elements(&self.areas.device, self.size)(first, head, 0);
        }
    }

    /// Reads the driver's index and what it covers.
    #[inline]
    fn refresh(&mut self) -> Result<u16, RingFault> {
        // Acquire: pairs with the driver's write barrier between filling ring entries and
        // descriptors and storing `avail.idx` (VIRTIO 1.3 §2.7.13.3). Without it we could read an
        // entry from before it was filled.
        let avail = self.areas.driver.load16_acquire(IDX);
        let ahead = avail.wrapping_sub(self.next_avail);
        if ahead > self.size {
            // Not remembered: whoever looks next finds it again, and the pop reports it.
            return Err(RingFault::AvailIndexJump);
        }
        let fresh = avail.wrapping_sub(self.seen_avail);
        self.seen_avail = avail;
        self.prefetch(avail, fresh);
        Ok(ahead)
    }
}

impl RingFormat for Split {
    const PACKED: bool = false;
    const DRIVER_ALIGN: usize = 2;

    fn area_bytes(size: u16) -> [usize; 3] {
        // The trailing event fields are part of the layout whether they are negotiated or not
        // (VIRTIO 1.3 §2.7, "6 +").
        let size = usize::from(size);
        [16 * size, RING + 2 * size + 2, RING + 8 * size + 2]
    }

    fn new(areas: Areas, config: &RingConfig) -> Result<Split, RingFault> {
        let size = config.size;
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(RingFault::Size);
        }
        let bytes = Split::area_bytes(size);
        let lens = [areas.desc.len(), areas.driver.len(), areas.device.len()];
        if lens.iter().zip(bytes).any(|(&len, need)| len < need) {
            return Err(RingFault::Areas);
        }
        let in_ring = [&areas.driver, &areas.device].map(|area| area.load16(IDX));
        let (avail, used) = resume(config.base.avail, in_ring, size);
        Ok(Split {
            areas,
            size,
            event_idx: config.event_idx,
            next_avail: avail,
            seen_avail: avail,
            next_used: used,
            published: used,
            signalled: used,
            in_order: config.in_order,
            batch: Batch::default(),
        })
    }

    #[inline(always)]
    fn peek(&mut self) -> Result<Option<Head>, RingFault> {
        if self.next_avail == self.seen_avail && self.refresh()? == 0 {
            return Ok(None);
        }
        let slot = self
            .areas
            .driver
            .load16(RING + 2 * self.mask(self.next_avail));
        if slot >= self.size {
            return Err(RingFault::DescIndex);
        }
        Ok(Some(Head {
            slot,
            desc: self.desc(slot),
        }))
    }

    #[inline]
    fn available(&mut self) -> Result<u16, RingFault> {
        self.refresh()
    }

    #[inline]
    fn backlog(&mut self, want: u16) -> u16 {
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        if known >= want {
            return known;
        }
        // An impossible index ends any wait: the next pop reports it.
        self.refresh().unwrap_or(want)
    }

    #[inline]
    fn next(&self, _slot: u16, desc: &Desc) -> Result<Head, RingFault> {
        let slot = desc.id;
        if slot >= self.size {
            return Err(RingFault::DescIndex);
        }
        Ok(Head {
            slot,
            desc: self.desc(slot),
        })
    }

    #[inline]
    fn next_indirect(_index: u32, len: u32, desc: &Desc) -> Result<Option<u32>, RingFault> {
        if !desc.has(Desc::NEXT) {
            return Ok(None);
        }
        let next = u32::from(desc.id);
        if next < len {
            Ok(Some(next))
        } else {
            Err(RingFault::DescIndex)
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields of one 64-bit word")]
    fn decode(words: [u64; 2]) -> Desc {
        // VIRTIO 1.3 §2.7.5: addr; len, flags, next.
        let [addr, rest] = words;
        Desc {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            id: (rest >> 48) as u16,
        }
    }

    #[inline]
    fn take(&mut self, head: u16, _slots: u16, _last: &Desc) -> ChainId {
        self.next_avail = self.next_avail.wrapping_add(1);
        ChainId::new(head, 1)
    }

    #[inline]
    fn take_singles(
        &mut self,
        writable: bool,
        out: &mut [Single],
        mut made: impl FnMut(ChainId, &Desc) -> Option<Single>,
    ) -> usize {
        let direction = if writable { Desc::WRITE } else { 0 };
        let mut taken = 0;
        let mut places = out.iter_mut();
        while places.len() > 0
            && (self.next_avail != self.seen_avail || self.refresh().is_ok_and(|count| count > 0))
        {
            let (size, mut next, end) = (self.size, self.next_avail, self.seen_avail);
            let before = taken;
            let known = usize::from(end.wrapping_sub(next));
            let descs = self.areas.desc.pairs64(0, usize::from(size));
            for place in places.by_ref().take(known) {
                let at = RING + 2 * usize::from(next & (size - 1));
                let slot = self.areas.driver.load16(at);
                // A slot beyond the table is not taken; the pop that follows reports it.
                let Some(pair) = descs.get(usize::from(slot)) else {
                    break;
                };
                let desc = Split::decode([pair.first(), pair.second()]);
                if desc.flags & (Desc::NEXT | Desc::INDIRECT | Desc::WRITE) != direction {
                    break;
                }
                let Some(single) = made(ChainId::new(slot, 1), &desc) else {
                    break;
                };
                *place = single;
                next = next.wrapping_add(1);
                taken += 1;
            }
            self.next_avail = next;
            if next != end || taken == before {
                break;
            }
        }
        taken
    }

    #[inline]
    fn untake(&mut self, _chain: &ChainId) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    #[inline(always)]
    fn put_used(&mut self, chain: &ChainId, written: u32) {
        self.put_used_singles(core::iter::once((chain.id(), written)));
    }

    #[inline(always)]
    fn put_used_singles(&mut self, used: impl Iterator<Item = (u16, u32)>) {
        let (size, in_order) = (self.size, self.in_order);
        let (mut next, mut batch) = (self.next_used, self.batch);
        let write = elements(&self.areas.device, size);
        for (head, written) in used {
            let joins = in_order && written == 0;
            // A driver that gives descriptors again before it was told that they are used could
            // make the batch longer than the ring.
            if batch.chains > 0 && (!joins || batch.chains == size) {
                write(next.wrapping_sub(batch.chains), batch.head, 0);
                batch.chains = 0;
            }
            if joins {
                batch.head = head;
                batch.chains += 1;
            } else {
                write(next, head, written);
            }
            next = next.wrapping_add(1);
        }
        (self.next_used, self.batch) = (next, batch);
    }

    #[inline]
    fn publish(&mut self) {
        if self.published != self.next_used {
            self.end_batch();
            // Release: the elements and the buffers must be visible before the index that covers
            // them (VIRTIO 1.3 §2.7.8.2); pairs with the driver's read barrier after `used.idx`.
            self.areas.device.store16_release(IDX, self.next_used);
            self.published = self.next_used;
        }
    }

    #[inline]
    fn wants_call(&mut self) -> bool {
        if self.signalled == self.published {
            return false;
        }
        // Orders our store of `used.idx` before the read of what the driver wants. Pairs with the
        // full barrier of the driver between writing `used_event` (or the flag) and looking at
        // `used.idx` again. Without it both sides could miss the other's store, and the driver
        // would sleep on a published element.
        fence(Ordering::SeqCst);
        let old = core::mem::replace(&mut self.signalled, self.published);
        if self.event_idx {
            let event = self.areas.driver.load16(self.used_event_at());
            return need_event(event, self.published, old);
        }
        self.areas.driver.load16(FLAGS) & flag::NO_INTERRUPT == 0
    }

    fn set_kicks(&mut self, wanted: bool) -> bool {
        if self.event_idx {
            // Off: an event index that was passed already is passed again only a lap of 2^16 later
            // (VIRTIO 1.3 §2.7.7.2), so there is nothing to write.
            if !wanted {
                return false;
            }
            self.areas
                .device
                .store16(self.avail_event_at(), self.next_avail);
        } else {
            self.areas
                .device
                .store16(FLAGS, if wanted { 0 } else { flag::NO_NOTIFY });
        }
        if !wanted {
            return false;
        }
        // Orders our request for kicks before the look at `avail.idx`. Pairs with the full barrier
        // of the driver between storing `avail.idx` and reading `avail_event` (or the flag).
        // Without it a chain could be added, unkicked, while we decide to sleep.
        fence(Ordering::SeqCst);
        // A bad index counts as work: the next pop reports it.
        !matches!(self.refresh(), Ok(0))
    }

    fn base(&self) -> VringBase {
        VringBase {
            avail: self.next_avail,
            used: self.next_used,
        }
    }

    fn swap_areas(&mut self, areas: Areas) -> Areas {
        core::mem::replace(&mut self.areas, areas)
    }
}

/// What writes the used element of an index: head and length. Those from the published index on are
/// ours until the index moves.
#[inline(always)]
fn elements(device: &Area, size: u16) -> impl Fn(u16, u16, u32) {
    let elements = device.pairs32(RING, usize::from(size));
    move |index, head, written| {
        if let Some(element) = elements.get(usize::from(index & (size - 1))) {
            // Unless it stands there already, from a lap before: drivers use their descriptors in
            // the same order again and again, and a line that is not written stays in the driver's
            // cache.
            if element.first() != u32::from(head) {
                element.set_first(head.into());
            }
            if element.second() != written {
                element.set_second(written);
            }
        }
    }
}

/// Where a ring goes on, as its next available and next used index: the base is what the front-end
/// says of the first, `in_ring` are the indexes of driver and device in memory.
///
/// What the driver has been shown as used stands in the ring itself, and a base that is ahead of it
/// means buffers in flight. A base behind it is that of a front-end that lost count: DPDK's sends 0
/// when its back-end is a new process, and the old buffers again would be frames sent twice and
/// memory written that the driver has taken back. So is a base of 0 just ahead of it. When the
/// ring's own indexes can't belong together, the front-end's word counts.
fn resume(base: u16, in_ring: [u16; 2], size: u16) -> (u16, u16) {
    let [avail, used] = in_ring;
    let in_flight = base.wrapping_sub(used) <= size;
    if in_flight && (base != 0 || used == 0) {
        (base, used)
    } else if avail.wrapping_sub(used) <= size {
        (used, used)
    } else {
        (base, base)
    }
}
