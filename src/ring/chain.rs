//! What a device sees of a virtqueue: chains, their identity, and the three verbs.

use crate::memory::{Segment, Segments};

use super::RingFault;

/// Identifies a popped chain until it is used. Neither `Copy` nor `Clone`: used exactly once.
#[must_use = "a popped chain must be put in the used ring or unpopped"]
#[derive(Debug, PartialEq, Eq)]
pub struct ChainId {
    /// Split: the head descriptor. Packed: the buffer id.
    id: u16,
    /// Slots of the main ring that the chain takes: split 1, packed as many as descriptors.
    slots: u16,
    /// Its place in the in-flight record (see [`super::Journal`]).
    entry: u16,
}

impl ChainId {
    /// The identity of a chain; formats and scripted queues make it.
    pub fn new(id: u16, slots: u16) -> ChainId {
        ChainId {
            id,
            slots,
            entry: 0,
        }
    }

    /// Split: the head descriptor. Packed: the buffer id.
    #[inline]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Slots of the main ring that the chain takes.
    #[inline]
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Its place in the in-flight record.
    #[inline]
    pub fn entry(&self) -> u16 {
        self.entry
    }

    /// The same chain with its place in the in-flight record.
    #[inline]
    pub(crate) fn with_entry(self, entry: u16) -> ChainId {
        ChainId { entry, ..self }
    }
}

/// A chain as popped: its identity, and where its segments are in the caller's list.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    /// To be given back by `put_used` or `unpop`.
    pub id: ChainId,
    /// Index of its first segment.
    pub first: u32,
    /// Device-readable segments, from `first` on.
    pub readable: u32,
    /// Device-writable segments, after the readable ones.
    pub writable: u32,
    /// Bytes in the readable segments.
    pub readable_bytes: u32,
    /// Bytes in the writable segments.
    pub writable_bytes: u32,
}

impl Chain {
    /// The readable segments in `segments`, the list that the chain was popped into.
    #[inline]
    pub fn readable<'a>(&self, segments: &'a Segments) -> &'a [Segment] {
        let first = self.first as usize;
        &segments.as_slice()[first..first + self.readable as usize]
    }

    /// The writable segments in `segments`, the list that the chain was popped into.
    #[inline]
    pub fn writable<'a>(&self, segments: &'a Segments) -> &'a [Segment] {
        let first = self.first as usize + self.readable as usize;
        &segments.as_slice()[first..first + self.writable as usize]
    }
}

/// What `pop` found.
#[derive(Debug, PartialEq, Eq)]
pub enum Popped {
    /// A chain, taken; its segments were appended.
    Chain(Chain),
    /// Nothing is available.
    Empty,
    /// A chain is there but can't be taken yet: a translation is missing, the caller's list of
    /// segments has no room left, or too many descriptors of long chains were walked since the last
    /// publish. The cursor has not moved.
    Wait,
}

/// A chain of one descriptor in one region, with a byte at least.
#[derive(Debug)]
pub struct Single {
    /// Its only segment.
    pub segment: Segment,
    id: ChainId,
}

impl Single {
    /// Room for a chain.
    pub const EMPTY: Single = Single {
        segment: Segment::EMPTY,
        id: ChainId {
            id: 0,
            slots: 0,
            entry: 0,
        },
    };

    /// The chain `id` with its segment; queues make it.
    #[inline]
    pub fn new(id: ChainId, segment: Segment) -> Single {
        Single { segment, id }
    }

    /// Its identity.
    #[inline]
    pub fn id(&self) -> &ChainId {
        &self.id
    }

    /// Its identity, to be given back by `put_used` or `unpop`; nothing is left.
    #[inline]
    pub fn take_id(&mut self) -> ChainId {
        core::mem::replace(&mut self.id, Single::EMPTY.id)
    }
}

/// What a device sees of a virtqueue.
pub trait ChainQueue {
    /// Takes available chains into `out`, from its start, as long as they are the simplest there
    /// are: one descriptor in one region, device-writable or not as `writable` says. Returns how
    /// many; fewer than have room say nothing: `pop` tells why, or takes the next.
    ///
    /// These are most of all chains of a network queue. They are apart from `pop` so that a burst
    /// of them is one short loop whose state stays in registers.
    fn pop_singles(&mut self, writable: bool, out: &mut [Single]) -> usize;

    /// As `put_used` for the oldest of `singles`, as many as `written` has lengths.
    fn put_used_singles(&mut self, singles: &[Single], written: impl Iterator<Item = u32>);

    /// As `pop_singles`, one chain.
    fn pop_single(&mut self, writable: bool) -> Option<Single> {
        let mut one = [Single::EMPTY];
        (self.pop_singles(writable, &mut one) == 1).then(|| {
            let [single] = one;
            single
        })
    }

    /// Takes the next available chain and appends its segments, readable ones first.
    ///
    /// # Errors
    /// The [`RingFault`] that latched the ring, now or earlier.
    fn pop(&mut self, segments: &mut Segments) -> Result<Popped, RingFault>;

    /// Gives back the chain popped last, unused: it will be popped again.
    fn unpop(&mut self, chain: ChainId);

    /// Stages a used element with length `written`. `writable` is what was written of the chain's
    /// segments, for the dirty log: too much does no harm there, too little does. The driver sees
    /// nothing before the burst is published.
    fn put_used(&mut self, chain: ChainId, written: u32, writable: &[Segment]);

    /// Descriptors that the ring has (the limit of what can ever be in flight).
    fn size(&self) -> u16;

    /// Slots of popped chains that are not used yet.
    fn in_flight(&self) -> u32;
}
