//! `RingFormat`: everything in which split and packed rings differ, and nothing else.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::memory::{Area, GuestRam, MemoryError};

use super::{ChainId, RingFault, Single};

/// Largest ring of either format (VIRTIO 1.3 §2.7, §2.8.10.1).
pub(super) const SIZE_MAX: u16 = 32768;

/// The three parts of a virtqueue by their names in VIRTIO 1.3 §2.6, for both formats.
#[derive(Debug)]
pub struct Areas {
    /// Descriptor Area: descriptor table, or descriptor ring.
    pub desc: Area,
    /// Driver Area: available ring, or driver event suppression.
    pub driver: Area,
    /// Device Area: used ring, or device event suppression.
    pub device: Area,
}

impl Areas {
    /// Finds the areas of a ring of format `F` with `size` descriptors at three front-end
    /// addresses.
    ///
    /// # Errors
    /// [`MemoryError`] when an area is not inside one region or not aligned.
    pub fn find<F: RingFormat>(
        ram: &Arc<GuestRam>,
        size: u16,
        desc: u64,
        driver: u64,
        device: u64,
    ) -> Result<Areas, MemoryError> {
        let bytes = F::area_bytes(size);
        Ok(Areas {
            desc: ram.area(desc, bytes[0], 16)?,
            driver: ram.area(driver, bytes[1], F::DRIVER_ALIGN)?,
            device: ram.area(device, bytes[2], 4)?,
        })
    }
}

/// Where a ring stands: what SET_VRING_BASE brings and GET_VRING_BASE takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VringBase {
    /// Split: the next avail index. Packed: next avail slot, bit 15 its wrap counter.
    pub avail: u16,
    /// Split: the next used index. Packed: next used slot, bit 15 its wrap counter.
    pub used: u16,
}

impl VringBase {
    /// Decodes the 32-bit value of SET_VRING_BASE (vhost-user: "A vring state description").
    ///
    /// DPDK's virtio-user fills only the low half for packed rings and leaves the high one 0, where
    /// QEMU fills both. The high half is 0 in earnest only for a ring that stands, drained, at its
    /// first slot; the low half says the same then. So 0 means "as the low half".
    pub fn from_u32(packed: bool, num: u32) -> VringBase {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "two 16-bit halves by definition"
        )]
        let (low, high) = (num as u16, (num >> 16) as u16);
        let used = if packed && high != 0 { high } else { low };
        VringBase { avail: low, used }
    }

    /// Encodes the 32-bit value of GET_VRING_BASE.
    pub fn to_u32(self, packed: bool) -> u32 {
        let high = if packed {
            u32::from(self.used) << 16
        } else {
            0
        };
        u32::from(self.avail) | high
    }

    /// Where a ring that was never used stands.
    pub fn fresh(packed: bool) -> VringBase {
        if packed {
            VringBase {
                avail: 0x8000,
                used: 0x8000,
            }
        } else {
            VringBase::default()
        }
    }
}

/// How a ring is set up.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// Number of descriptors.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER was negotiated, and the device uses all chains in order.
    pub in_order: bool,
    /// Every buffer is device-readable (a network transmit queue). Then WRITE flags inside an
    /// indirect table of a packed ring are ignored: DPDK's driver leaves one on its header
    /// (docs/decisions/0006).
    pub readable_only: bool,
    /// Where to begin.
    pub base: VringBase,
}

/// A descriptor, read once, by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// Split: `next`. Packed: the buffer id.
    pub id: u16,
}

#[expect(clippy::cast_possible_truncation, reason = "flags are 1, 2 and 4")]
impl Desc {
    /// Another descriptor follows.
    pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    /// The device may write the buffer (and must not read it).
    pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

    /// Whether any of `flags` is set.
    #[inline]
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }
}

/// The first descriptor of the next available chain.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// Its slot in the descriptor table or ring.
    pub slot: u16,
    /// The descriptor itself.
    pub desc: Desc,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for crate::ring::Split {}
    impl Sealed for crate::ring::Packed {}
}

/// One of the two formats of VIRTIO 1.3 §2.6.
pub trait RingFormat: sealed::Sealed + core::fmt::Debug + Send + Sized + 'static {
    /// Whether this is the packed format.
    const PACKED: bool;
    /// Alignment of the driver area in bytes.
    const DRIVER_ALIGN: usize;

    /// Bytes of the descriptor, driver and device area of a ring with `size` descriptors.
    fn area_bytes(size: u16) -> [usize; 3];

    /// A ring over `areas`, standing at `config.base`.
    ///
    /// # Errors
    /// [`RingFault::Size`], [`RingFault::Base`] or [`RingFault::Areas`].
    fn new(areas: Areas, config: &RingConfig) -> Result<Self, RingFault>;

    /// The head of the next available chain, without taking it. Looks at shared memory only when
    /// what is known to be available is used up.
    ///
    /// # Errors
    /// A [`RingFault`] when the driver's index or head is impossible.
    fn peek(&mut self) -> Result<Option<Head>, RingFault>;

    /// Chains known to be available without another look at the driver's index; packed rings
    /// answer 0 or 1.
    fn available(&mut self) -> Result<u16, RingFault>;

    /// Chains that seem to be available, without looking for more than `want` of them: a guide for
    /// whoever wants to wait until a burst is worth taking. A pop may still find none, where a
    /// driver fills a packed burst from its end, or find a chain that is not good.
    fn backlog(&mut self, want: u16) -> u16;

    /// The descriptor after `desc` in the main ring, with its slot.
    ///
    /// # Errors
    /// [`RingFault::DescIndex`].
    fn next(&self, slot: u16, desc: &Desc) -> Result<Head, RingFault>;

    /// Which entry of an indirect table of `len` entries follows entry `index`, if any.
    ///
    /// # Errors
    /// [`RingFault::DescIndex`].
    fn next_indirect(index: u32, len: u32, desc: &Desc) -> Result<Option<u32>, RingFault>;

    /// Decodes a descriptor from its two little-endian words.
    fn decode(words: [u64; 2]) -> Desc;

    /// Takes the chain that begins at `head`, has `slots` descriptors in the main ring, and ends
    /// with `last`.
    fn take(&mut self, head: u16, slots: u16, last: &Desc) -> ChainId;

    /// Takes chains of one descriptor, device-writable or not as `writable` says, into `out` as
    /// long as `made` makes something of them. Returns how many. It ends without a word before
    /// anything that is not such a chain.
    fn take_singles(
        &mut self,
        writable: bool,
        out: &mut [Single],
        made: impl FnMut(ChainId, &Desc) -> Option<Single>,
    ) -> usize;

    /// Gives back the chain taken last.
    fn untake(&mut self, chain: &ChainId);

    /// Writes a used element where the driver does not look yet.
    fn put_used(&mut self, chain: &ChainId, written: u32);

    /// As `put_used` for chains of one descriptor each: id and length of what was written.
    fn put_used_singles(&mut self, used: impl Iterator<Item = (u16, u32)>);

    /// Shows all written used elements by one release store.
    fn publish(&mut self);

    /// Whether the driver wants a call for what was published since the last time this was asked.
    fn wants_call(&mut self) -> bool;

    /// Turns kicks on or off. On: returns whether work arrived meanwhile, so that nobody sleeps on
    /// a chain whose kick was suppressed.
    fn set_kicks(&mut self, wanted: bool) -> bool;

    /// Where the ring stands.
    fn base(&self) -> VringBase;

    /// Exchanges the areas for others over the same ring; returns the old ones.
    fn swap_areas(&mut self, areas: Areas) -> Areas;
}
