//! Requests in flight: a fixed table of slots with generations.
//!
//! A slot keeps what is needed until the request is answered: the chain, the data segments (as the
//! host reads or writes them, header and status byte cut off), the status byte's segment, and how
//! much is done. Segments of usual length live in storage made at start; only a request with more
//! than the usual number of segments makes its slot's list grow, once.

use crate::host::blk::Token;
use crate::memory::Segment;
use crate::ring::ChainId;

use super::SEG_MAX;
use super::ranges::Ranges;
use super::request::Request;

/// Segments that a slot holds without growing: the data's, the status byte's, and one more that
/// short I/O makes by cutting one in two.
const SEGMENTS_USUAL: usize = SEG_MAX as usize + 2;

/// One request in flight.
#[derive(Debug)]
pub(super) struct Slot {
    /// The chain; `None` when the slot is free.
    pub(super) chain: Option<ChainId>,
    /// What was asked for.
    pub(super) request: Request,
    /// Data segments, and the status byte's segment last.
    pub(super) segments: Vec<Segment>,
    /// The used length when only the status byte is written.
    pub(super) status_only: u32,
    /// Data bytes done.
    pub(super) done: u32,
    /// Index of the first data segment that is not done, after the first `done` bytes.
    pub(super) next: usize,
    /// It has waited for space.
    pub(super) held: bool,
    /// Ranges of a DISCARD or WRITE_ZEROES; apart, so that slots stay small.
    pub(super) ranges: Box<Ranges>,
    /// The memory table that the segments belong to (see [`Slots::oldest_epoch`]).
    epoch: u32,
    generation: u16,
}

/// The table.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    epoch: u32,
}

impl Slots {
    /// A table for `count` requests.
    pub(super) fn new(count: u16) -> Slots {
        let slot = |_| Slot {
            chain: None,
            request: Request::Flush,
            segments: Vec::with_capacity(SEGMENTS_USUAL),
            status_only: 1,
            done: 0,
            next: 0,
            held: false,
            ranges: Box::default(),
            epoch: 0,
            generation: 0,
        };
        Slots {
            slots: (0..count).map(slot).collect(),
            free: (0..count).rev().collect(),
            epoch: 0,
        }
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another request can be taken.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// How many more requests can be taken.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Takes a free slot for `request` of `chain`; there must be one.
    pub(super) fn take(&mut self, chain: ChainId, request: Request) -> (u16, &mut Slot) {
        let index = self.free.pop().expect("the caller asked for room first");
        let slot = &mut self.slots[usize::from(index)];
        slot.chain = Some(chain);
        slot.request = request;
        slot.segments.clear();
        slot.done = 0;
        slot.next = 0;
        slot.epoch = self.epoch;
        (index, slot)
    }

    /// The name of the request in `index`.
    pub(super) fn token(&self, index: u16) -> Token {
        Token {
            slot: index,
            generation: self.slots[usize::from(index)].generation,
        }
    }

    /// The request in slot `index`.
    pub(super) fn get(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }

    /// The slot that `token` names.
    ///
    /// # Panics
    /// When the request was answered already: the host completed it twice.
    pub(super) fn of(&mut self, token: Token) -> &mut Slot {
        let slot = &mut self.slots[usize::from(token.slot)];
        assert!(
            slot.generation == token.generation && slot.chain.is_some(),
            "the host completed a request twice"
        );
        slot
    }

    /// Frees the slot `index`.
    pub(super) fn free(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
    }

    /// What is in each slot: its generation, and the request in flight.
    pub(super) fn requests(&self) -> impl Iterator<Item = (u16, Option<Request>)> {
        self.slots
            .iter()
            .map(|slot| (slot.generation, slot.chain.as_ref().map(|_| slot.request)))
    }

    /// From now on requests belong to another memory table. Returns its number.
    pub(super) fn next_epoch(&mut self) -> u32 {
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch
    }

    /// The number of the oldest table that a request in flight points into.
    pub(super) fn oldest_epoch(&self) -> Option<u32> {
        let in_use = self.slots.iter().filter(|slot| slot.chain.is_some());
        // Ages, not numbers, so that the wrap of the counter does not matter.
        let age = in_use
            .map(|slot| self.epoch.wrapping_sub(slot.epoch))
            .max()?;
        Some(self.epoch.wrapping_sub(age))
    }
}
