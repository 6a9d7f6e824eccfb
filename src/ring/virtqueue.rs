//! `Virtqueue`: what is common to both formats.
//!
//! The walk, the limits that keep a hostile driver harmless, translation, the count of what is in
//! flight, the fault latch, the dirty log and the order of publishing.

use std::sync::Arc;

use crate::memory::{Access, DirtyLog, GuestRam, Segment, Segments, Translate};

use super::RingFault;
use super::chain::{Chain, ChainId, ChainQueue, Popped, Single};
use super::format::{Areas, Desc, Head, RingConfig, RingFormat, VringBase};
use super::journal::{Journal, NoJournal};

/// Entries that an indirect table may have on a ring smaller than this. VIRTIO 1.3 §2.7.5.3.1
/// forbids chains longer than the ring, but drivers size their tables by the device's limit on
/// segments; QEMU accepts 1024 from any ring, and so do we.
const INDIRECT_MAX: u32 = 1024;

/// Descriptors that are walked in a burst, beyond the first of each chain, before no other chain of
/// many is begun in it. Those without a byte fill no list of segments: nothing else would end the
/// burst of a driver that makes all its chains as long as they may be, and everybody on its worker
/// waits for that end. Bursts of 256 frames with 64 descriptors each come through whole.
const WALK_MAX: u32 = 16384;

/// Why the walk ended without a chain.
enum Stop {
    Fault(RingFault),
    Wait,
}

impl From<RingFault> for Stop {
    fn from(fault: RingFault) -> Stop {
        Stop::Fault(fault)
    }
}

/// What the walk has gathered of one chain.
struct Walk<'a> {
    ram: &'a GuestRam,
    segments: &'a mut Segments,
    /// Index of the chain's first segment.
    first: usize,
    /// Index of its first writable segment, once there was a writable descriptor.
    first_writable: Option<usize>,
    readable_bytes: u64,
    writable_bytes: u64,
    /// Entries of its indirect table that were looked at.
    entries: u32,
}

impl Walk<'_> {
    #[inline]
    fn add(&mut self, desc: &Desc) -> Result<(), Stop> {
        let access = if desc.has(Desc::WRITE) {
            self.first_writable.get_or_insert(self.segments.len());
            self.writable_bytes += u64::from(desc.len);
            Access::Write
        } else if self.first_writable.is_some() {
            // VIRTIO 1.3 §2.7.4.2: writable buffers come after readable ones.
            return Err(RingFault::ReadableAfterWritable.into());
        } else {
            self.readable_bytes += u64::from(desc.len);
            Access::Read
        };
        if self.readable_bytes + self.writable_bytes > u64::from(u32::MAX) {
            return Err(RingFault::ChainBytes.into());
        }
        self.ram
            .translate(desc.addr, desc.len, access, self.segments)
            .map_err(|error| match error {
                Translate::Unmapped => RingFault::Unmapped.into(),
                Translate::Miss { .. } => Stop::Wait,
                // Room comes back when the caller's burst is done, unless the chain alone is too
                // long.
                Translate::Full if self.first > 0 => Stop::Wait,
                Translate::Full => RingFault::TooManySegments.into(),
            })
    }

    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "bounded by SEGMENTS_MAX and ChainBytes"
    )]
    fn finish(self, id: ChainId) -> Chain {
        let end = self.segments.len();
        let split = self.first_writable.unwrap_or(end);
        Chain {
            id,
            first: self.first as u32,
            readable: (split - self.first) as u32,
            writable: (end - split) as u32,
            readable_bytes: self.readable_bytes as u32,
            writable_bytes: self.writable_bytes as u32,
        }
    }
}

/// A virtqueue of either format.
#[derive(Debug)]
pub struct Virtqueue<F: RingFormat, J: Journal = NoJournal> {
    format: F,
    journal: J,
    ram: Arc<GuestRam>,
    size: u16,
    indirect: bool,
    readable_only: bool,
    /// Slots of popped chains that are not used yet: heads when split, descriptors when packed.
    in_flight: u32,
    /// Used elements staged since the last publish.
    staged: u32,
    /// Descriptors walked since the last publish, beyond the first of each chain.
    walked: u32,
    /// The rule that was broken. A broken ring gives out nothing: the cursor stays on the chain at
    /// fault, so that a poller would otherwise meet it for ever.
    fault: Option<RingFault>,
    log: Option<Arc<DirtyLog>>,
}

impl<F: RingFormat> Virtqueue<F> {
    /// A virtqueue over `areas`, with buffers in `ram`.
    ///
    /// # Errors
    /// [`RingFault`] when size, base or areas don't fit together.
    pub fn new(ram: Arc<GuestRam>, areas: Areas, config: &RingConfig) -> Result<Self, RingFault> {
        Virtqueue::with_journal(ram, areas, config, NoJournal)
    }
}

impl<F: RingFormat, J: Journal> Virtqueue<F, J> {
    /// As [`Virtqueue::new`], with a record of what is in flight.
    ///
    /// # Errors
    /// [`RingFault`] when size, base or areas don't fit together.
    pub fn with_journal(
        ram: Arc<GuestRam>,
        areas: Areas,
        config: &RingConfig,
        journal: J,
    ) -> Result<Self, RingFault> {
        Ok(Virtqueue {
            format: F::new(areas, config)?,
            journal,
            ram,
            size: config.size,
            indirect: config.indirect,
            readable_only: config.readable_only,
            in_flight: 0,
            staged: 0,
            walked: 0,
            fault: None,
            log: None,
        })
    }

    /// Makes all staged used elements visible. Returns whether the driver wants a call for them. It
    /// is the end of a burst: long chains may be popped again.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.walked = 0;
        if self.staged == 0 {
            return false;
        }
        self.staged = 0;
        self.journal.commit_begin();
        self.format.publish();
        self.journal.commit_end();
        self.format.wants_call()
    }

    /// Used elements staged since the last publish.
    #[inline]
    pub fn staged(&self) -> u32 {
        self.staged
    }

    /// Turns kicks on or off. On: returns whether a chain is available now. A broken ring never
    /// asks for kicks.
    pub fn set_kicks(&mut self, wanted: bool) -> bool {
        self.format.set_kicks(wanted && self.fault.is_none()) && self.fault.is_none()
    }

    /// Whether a chain is available, looking at the ring anew.
    ///
    /// # Errors
    /// The latched fault, or one found by this look (which latches).
    pub fn has_available(&mut self) -> Result<bool, RingFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let answer = self.format.available();
        answer
            .map(|count| count > 0)
            .inspect_err(|&fault| self.fault = Some(fault))
    }

    /// Chains that seem to be available, without looking for more than `want` of them: a guide, not
    /// a promise. A broken ring has none.
    #[inline]
    pub fn backlog(&mut self, want: u16) -> u16 {
        match self.fault {
            None => self.format.backlog(want),
            Some(_) => 0,
        }
    }

    /// The rule that the driver broke, once it did.
    pub fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    /// Latches `fault`, found outside the ring (a copy that failed on a guest address).
    pub fn latch(&mut self, fault: RingFault) {
        self.fault.get_or_insert(fault);
    }

    /// Where the ring stands. With chains in flight, `avail` is ahead of `used` by them.
    pub fn base(&self) -> VringBase {
        self.format.base()
    }

    /// Turns the dirty log on or off.
    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    /// The memory table in use.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Goes over to another memory table, in which the same ring has `areas`. Chains popped
    /// earlier keep pointing into the old table, which is returned so that the caller keeps it
    /// until they are used, and drops it where unmapping does not hurt.
    #[must_use = "the old table must outlive the chains popped from it"]
    pub fn swap(&mut self, ram: Arc<GuestRam>, areas: Areas) -> (Arc<GuestRam>, Areas) {
        let areas = self.format.swap_areas(areas);
        (core::mem::replace(&mut self.ram, ram), areas)
    }

    #[inline]
    fn walk(&mut self, head: Head, segments: &mut Segments) -> Result<Chain, Stop> {
        let first = segments.len();
        let mut walk = Walk {
            ram: &self.ram,
            segments,
            first,
            first_writable: None,
            readable_bytes: 0,
            writable_bytes: 0,
            entries: 0,
        };
        let (mut at, mut slots) = (head, 1u16);
        loop {
            if at.desc.has(Desc::INDIRECT) {
                if slots == 1 {
                    self.may_walk()?;
                }
                let walked = self.walk_indirect(&at.desc, &mut walk);
                self.walked += walk.entries;
                walked?;
                break;
            }
            walk.add(&at.desc)?;
            if !at.desc.has(Desc::NEXT) {
                break;
            }
            if slots == 1 {
                self.may_walk()?;
            }
            if slots == self.size {
                return Err(RingFault::ChainTooLong.into());
            }
            self.walked += 1;
            at = self.format.next(at.slot, &at.desc)?;
            slots += 1;
        }
        let taken = if F::PACKED { u32::from(slots) } else { 1 };
        if self.in_flight + taken > u32::from(self.size) {
            return Err(RingFault::TooManyInFlight.into());
        }
        let mut chain = walk.finish(self.format.take(head.slot, slots, &at.desc));
        self.in_flight += taken;
        let entry = self.journal.took(&chain.id);
        chain.id = chain.id.with_entry(entry);
        Ok(chain)
    }

    /// Whether another chain of more than one descriptor may be begun in this burst. Once begun it
    /// is walked to its end, so that the longest one there can be still has a burst of its own.
    #[inline]
    fn may_walk(&self) -> Result<(), Stop> {
        match self.walked < WALK_MAX {
            true => Ok(()),
            false => Err(Stop::Wait),
        }
    }

    /// VIRTIO 1.3 §2.7.5.3, §2.8.7.
    fn walk_indirect(&self, table: &Desc, walk: &mut Walk<'_>) -> Result<(), Stop> {
        if !self.indirect {
            return Err(RingFault::IndirectNotNegotiated.into());
        }
        if table.has(Desc::NEXT) {
            return Err(RingFault::IndirectNested.into());
        }
        if table.len == 0 || !table.len.is_multiple_of(16) {
            return Err(RingFault::IndirectLength.into());
        }
        let len = table.len / 16;
        let limit = u32::from(self.size).max(INDIRECT_MAX);
        if F::PACKED && len > limit {
            return Err(RingFault::IndirectTooLong.into());
        }
        let mut index = 0;
        loop {
            walk.entries += 1;
            if walk.entries > limit {
                return Err(RingFault::IndirectTooLong.into());
            }
            let at = table
                .addr
                .checked_add(16 * u64::from(index))
                .ok_or(RingFault::Unmapped)?;
            let mut desc = F::decode(self.ram.read_entry(at).ok_or(RingFault::Unmapped)?);
            if F::PACKED && self.readable_only {
                desc.flags &= !Desc::WRITE;
            }
            if desc.has(Desc::INDIRECT) {
                return Err(RingFault::IndirectNested.into());
            }
            walk.add(&desc)?;
            match F::next_indirect(index, len, &desc)? {
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
    }

    #[cold]
    fn stop(
        &mut self,
        stop: &Stop,
        segments: &mut Segments,
        len: usize,
    ) -> Result<Popped, RingFault> {
        segments.truncate(len);
        match *stop {
            Stop::Wait => Ok(Popped::Wait),
            Stop::Fault(fault) => {
                self.fault = Some(fault);
                Err(fault)
            }
        }
    }
}

impl<F: RingFormat, J: Journal> ChainQueue for Virtqueue<F, J> {
    #[inline]
    fn pop_singles(&mut self, writable: bool, out: &mut [Single]) -> usize {
        if self.fault.is_some() {
            return 0;
        }
        let room = u32::from(self.size).saturating_sub(self.in_flight) as usize;
        let room = room.min(out.len());
        let (ram, journal) = (&self.ram, &mut self.journal);
        let mut find = ram.finder();
        let made = |id: ChainId, desc: &Desc| {
            let segment = find(desc.addr, desc.len)?;
            let entry = journal.took(&id);
            Some(Single::new(id.with_entry(entry), segment))
        };
        let taken = self.format.take_singles(writable, &mut out[..room], made);
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        {
            self.in_flight += taken as u32;
        }
        taken
    }

    #[inline]
    fn put_used_singles(&mut self, singles: &[Single], written: impl Iterator<Item = u32>) {
        let (log, ram, journal) = (&self.log, &self.ram, &mut self.journal);
        let mut count = 0;
        let used = singles.iter().zip(written).map(|(single, written)| {
            if let Some(log) = log
                && written > 0
            {
                log.mark(ram, core::slice::from_ref(&single.segment));
            }
            journal.staged(single.id().entry());
            count += 1;
            (single.id().id(), written)
        });
        self.format.put_used_singles(used);
        self.in_flight -= count;
        self.staged += count;
    }

    fn pop(&mut self, segments: &mut Segments) -> Result<Popped, RingFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let (len, walked) = (segments.len(), self.walked);
        let head = match self.format.peek() {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(Popped::Empty),
            Err(fault) => return self.stop(&Stop::Fault(fault), segments, len),
        };
        match self.walk(head, segments) {
            Ok(chain) => Ok(Popped::Chain(chain)),
            Err(stop) => {
                // A chain that waits does not count: it is walked again in each turn, and where
                // it is all there is, nothing is published, which begins the count anew.
                self.walked = walked;
                self.stop(&stop, segments, len)
            }
        }
    }

    #[inline]
    fn unpop(&mut self, chain: ChainId) {
        self.in_flight -= u32::from(chain.slots());
        self.journal.gave_back(chain.entry());
        self.format.untake(&chain);
    }

    #[inline(always)]
    fn put_used(&mut self, chain: ChainId, written: u32, writable: &[Segment]) {
        if let Some(log) = &self.log {
            log.mark(&self.ram, writable);
        }
        self.format.put_used(&chain, written);
        self.journal.staged(chain.entry());
        self.in_flight -= u32::from(chain.slots());
        self.staged += 1;
    }

    #[inline]
    fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn in_flight(&self) -> u32 {
        self.in_flight
    }
}
