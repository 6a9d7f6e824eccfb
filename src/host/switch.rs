//! A learning L2 switch: which ports the frames of a burst go to, and in which form.
//!
//! It looks at the first bytes of each frame, once, and moves no payload: a tag is put in or taken
//! out by listing other segments. Ports are numbers; what stands behind them is the engine's
//! business. Any number of workers may use one switch at the same time.

mod fdb;
mod filter;
mod vlan;

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::memory::{Bounce, Segment, Segments, copy};

use super::net::{BURST_FRAMES_MAX, DropReason, Frame, Verdict};

use fdb::{Fdb, Station};
pub use filter::Filter;
pub use vlan::{VLAN_MAX, VlanMode, VlanSet};

/// Ports of a switch at most: the bits of a word.
pub const PORTS_MAX: usize = 64;

/// Where addresses end and the type, or the tag, begins.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
const ETHERNET: usize = 14;
const TYPE_VLAN: [u8; 2] = [0x81, 0x00];
/// Of a provider's tag, IEEE 802.1ad.
const TYPE_SERVICE_VLAN: [u8; 2] = [0x88, 0xa8];
/// Priority and drop eligibility in a tag.
const PRIORITY: u16 = 0xf000;
/// How many frames ahead the first lines are asked for.
const PREFETCH_FRAMES: usize = 8;
/// Bytes of a frame that are looked at: Ethernet, one tag, IPv6.
const LOOK: usize = 64;

/// What is chosen about a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortRules {
    /// Its VLANs.
    pub vlan: VlanMode,
    /// Nothing passes between two isolated ports.
    pub isolated: bool,
    /// Frames for all (broadcast, multicast, unknown stations) that it may send in a second.
    pub flood_limit: Option<u32>,
    /// Longest IP packet that it is given, in bytes.
    pub mtu: Option<u16>,
    /// Who may send.
    pub filter: Filter,
    /// Stations that are there for good.
    pub stations: Vec<[u8; 6]>,
}

/// Frames for all that a port may still send.
#[derive(Debug, Default)]
struct FloodBudget {
    /// Second in the high half, frames in it so far in the low half.
    used: AtomicU64,
}

/// The ports, and where stations are.
#[derive(Debug)]
pub struct Switch {
    ports: Box<[PortRules]>,
    budgets: Box<[FloodBudget]>,
    table: Fdb,
}

/// One frame on its way out of one port.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// The port.
    pub port: u16,
    /// The frame in the form that the port gives it.
    pub frame: Frame,
    /// Its index in the burst.
    pub index: u16,
    /// It goes to this port alone.
    pub alone: bool,
}

/// Where the frames of one burst go.
#[derive(Debug)]
pub struct Ways {
    /// In the order of the frames.
    pub list: Vec<Way>,
    /// The ports that occur in it.
    pub ports: u64,
    /// Tags put in, in memory of our own.
    tags: Bounce,
    tags_used: usize,
}

impl Ways {
    /// No way yet; room for a burst that goes to every port.
    pub fn new() -> Ways {
        Ways {
            list: Vec::with_capacity(BURST_FRAMES_MAX * PORTS_MAX),
            ports: 0,
            tags: Bounce::new(BURST_FRAMES_MAX * TAG),
            tags_used: 0,
        }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.ports = 0;
        self.tags_used = 0;
    }

    fn push(&mut self, way: Way) {
        self.ports |= 1 << way.port;
        self.list.push(way);
    }

    /// A segment with a tag: VLAN number and priority.
    fn tag(&mut self, tag: u16) -> Option<Segment> {
        let place = self.tags.segment().skip(self.tags_used).take(TAG);
        let [high, low] = tag.to_be_bytes();
        let bytes = [TYPE_VLAN[0], TYPE_VLAN[1], high, low];
        self.tags_used += TAG;
        (copy::write(&[place], 0, &bytes) == TAG).then_some(place)
    }
}

impl Default for Ways {
    fn default() -> Ways {
        Ways::new()
    }
}

/// What was found at the front of a frame.
#[derive(Debug, Clone, Copy)]
struct Seen {
    to: [u8; 6],
    from: [u8; 6],
    /// VLAN number of the tag, if there is one (0: a priority only).
    tag: Option<u16>,
    /// Its [`PRIORITY`].
    priority: u16,
    bytes: [u8; LOOK],
    len: usize,
}

impl Seen {
    #[inline]
    fn read(frame: &Frame, segments: &Segments) -> Option<Seen> {
        let mut bytes = [0; LOOK];
        let len = copy::read(frame.payload(segments), 0, &mut bytes);
        if len < ETHERNET {
            return None;
        }
        let mac = |at: usize| core::array::from_fn(|i| bytes[at + i]);
        let is_tagged = bytes[12..14] == TYPE_VLAN;
        if is_tagged && len < ETHERNET + TAG {
            return None;
        }
        let tag = is_tagged.then(|| u16::from_be_bytes([bytes[14], bytes[15]]));
        Some(Seen {
            to: mac(0),
            from: mac(6),
            tag: tag.map(|tag| tag & 0xfff),
            priority: tag.map_or(0, |tag| tag & PRIORITY),
            bytes,
            len,
        })
    }

    /// Whether another tag comes after the first.
    fn is_tagged_twice(&self) -> bool {
        let next = [self.bytes[16], self.bytes[17]];
        self.tag.is_some() && [TYPE_VLAN, TYPE_SERVICE_VLAN].contains(&next)
    }

    /// What comes after addresses and tag, from the type on.
    fn rest(&self) -> &[u8] {
        let at = if self.tag.is_some() {
            ADDRESSES + TAG
        } else {
            ADDRESSES
        };
        self.bytes.get(at..self.len).unwrap_or_default()
    }
}

/// The forms of one frame, made when a port asks for them.
struct Forms {
    index: u16,
    alone: bool,
    vlan: u16,
    /// As it came in.
    same: Frame,
    /// VLAN number of the tag that it came with (0: a priority only).
    tag: Option<u16>,
    priority: u16,
    /// Without its first tag it would be of the VLAN of its second.
    keeps_tag: bool,
    /// Without a tag, and with one.
    made: [Option<Frame>; 2],
}

impl Switch {
    /// A switch with these ports, [`PORTS_MAX`] at most, that forgets stations after `ageing`
    /// seconds.
    pub fn new(ports: Vec<PortRules>, ageing: u32) -> Switch {
        let table = Fdb::new(ageing);
        for (port, rules) in (0..).zip(&ports) {
            for &mac in &rules.stations {
                for vlan in rules.vlans() {
                    table.fix(Station::new(vlan, mac), port);
                }
            }
        }
        Switch {
            budgets: ports.iter().map(|_| FloodBudget::default()).collect(),
            ports: ports.into_boxed_slice(),
            table,
        }
    }

    /// Number of its ports.
    pub fn ports(&self) -> usize {
        self.ports.len()
    }

    /// Finds the ways of `frames`, which came in at `port` at second `now`. A frame that may not
    /// come in is dropped; of the others the verdict is as good as sent. Other forms of frames are
    /// added to `segments`.
    pub fn route(
        &self,
        port: u16,
        now: u32,
        frames: &mut [Frame],
        segments: &mut Segments,
        ways: &mut Ways,
    ) {
        ways.clear();
        for index in 0..frames.len() {
            if let Some(ahead) = frames.get(index + PREFETCH_FRAMES)
                && let Some(segment) = segments.as_slice().get(ahead.first as usize)
            {
                copy::prefetch_read(segment);
            }
            let frame = &mut frames[index];
            if frame.verdict != Verdict::Retry {
                continue;
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most BURST_FRAMES_MAX")]
            let at = (port, index as u16);
            frame.verdict = match self.route_one(at, now, frame, segments, ways) {
                Ok(()) => Verdict::Sent,
                Err(reason) => Verdict::Dropped(reason),
            };
        }
    }

    fn route_one(
        &self,
        (port, index): (u16, u16),
        now: u32,
        frame: &Frame,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<(), DropReason> {
        let rules = &self.ports[usize::from(port)];
        let seen = Seen::read(frame, segments).ok_or(DropReason::BadFrame)?;
        let vlan = rules.vlan.ingress(seen.tag).ok_or(DropReason::Vlan)?;
        if !rules.filter.allows(seen.from, seen.rest()) {
            return Err(DropReason::Spoofed);
        }
        // A group can't send.
        if seen.from[0] & 1 == 0 {
            self.table.learn(Station::new(vlan, seen.from), port, now);
        }
        let mut forms = Forms {
            index,
            alone: false,
            vlan,
            same: *frame,
            tag: seen.tag,
            priority: seen.priority,
            keeps_tag: seen.is_tagged_twice(),
            made: [None; 2],
        };
        let known = match seen.to[0] & 1 {
            0 => self.table.find(Station::new(vlan, seen.to), now),
            _ => None,
        };
        match known {
            // Its own segment has it already.
            Some(to) if to == port => Ok(()),
            Some(to) => {
                forms.alone = true;
                self.send(port, to, &mut forms, segments, ways)
            }
            None => self.flood(port, now, &mut forms, segments, ways),
        }
    }

    /// To all ports of the VLAN but the one it came from.
    #[cold]
    fn flood(
        &self,
        port: u16,
        now: u32,
        forms: &mut Forms,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<(), DropReason> {
        if !self.may_flood(port, now) {
            return Err(DropReason::Storm);
        }
        for to in (0..).take(self.ports.len()) {
            if to != port {
                // What one port can't take is no reason to withhold it from the others.
                let _ = self.send(port, to, forms, segments, ways);
            }
        }
        Ok(())
    }

    fn may_flood(&self, port: u16, now: u32) -> bool {
        let Some(limit) = self.ports[usize::from(port)].flood_limit else {
            return true;
        };
        let budget = &self.budgets[usize::from(port)].used;
        let there = budget.load(Relaxed);
        let used = if there >> 32 == u64::from(now) {
            there & u64::from(u32::MAX)
        } else {
            0
        };
        if used >= u64::from(limit) {
            return false;
        }
        // Two workers may both count on the same number: the cap is not that exact.
        budget.store(u64::from(now) << 32 | (used + 1), Relaxed);
        true
    }

    /// To one port, in its form.
    #[inline]
    fn send(
        &self,
        from: u16,
        to: u16,
        forms: &mut Forms,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<(), DropReason> {
        let (source, target) = (&self.ports[usize::from(from)], &self.ports[usize::from(to)]);
        if source.isolated && target.isolated {
            return Err(DropReason::Isolated);
        }
        let tagged = target.vlan.egress(forms.vlan).ok_or(DropReason::Vlan)?;
        if forms.keeps_tag && !tagged {
            return Err(DropReason::Vlan);
        }
        let frame = forms
            .get(tagged, segments, ways)
            .ok_or(DropReason::TooBig)?;
        if target
            .mtu
            .is_some_and(|mtu| is_too_long(&frame, tagged, mtu))
        {
            return Err(DropReason::Mtu);
        }
        ways.push(Way {
            port: to,
            frame,
            index: forms.index,
            alone: forms.alone,
        });
        Ok(())
    }
}

impl PortRules {
    /// The VLANs that its frames may belong to.
    fn vlans(&self) -> Vec<u16> {
        match &self.vlan {
            VlanMode::Access(vlan) => vec![*vlan],
            VlanMode::Trunk { allowed, native } => allowed.iter().chain(*native).collect(),
        }
    }
}

/// Whether an IP packet in `frame` is longer than `mtu`; one that is still to be segmented is not.
fn is_too_long(frame: &Frame, tagged: bool, mtu: u16) -> bool {
    let header = if tagged { ETHERNET + TAG } else { ETHERNET };
    frame.header.gso_type == 0 && frame.bytes as usize > header + usize::from(mtu)
}

impl Forms {
    /// The frame with a tag, or without.
    #[inline]
    fn get(&mut self, tagged: bool, segments: &mut Segments, ways: &mut Ways) -> Option<Frame> {
        let as_it_came = match self.tag {
            None => !tagged,
            // A priority alone is not the tag that a trunk wants to see.
            Some(0) => false,
            Some(_) => tagged,
        };
        if as_it_came {
            return Some(self.same);
        }
        let made = self.made[usize::from(tagged)];
        let frame = made.or_else(|| self.make(tagged, segments, ways))?;
        self.made[usize::from(tagged)] = Some(frame);
        Some(frame)
    }

    /// Takes the tag out, if there is one, and puts one in, if there is to be one.
    #[cold]
    fn make(&self, tagged: bool, segments: &mut Segments, ways: &mut Ways) -> Option<Frame> {
        let first = self.same.first as usize;
        let payload = first..first + self.same.count as usize;
        let start = segments.len();
        add_range(segments, payload.clone(), 0, ADDRESSES)?;
        if tagged {
            let tag = ways.tag(self.vlan | self.priority)?;
            segments.push(tag).then_some(())?;
        }
        let taken = if self.tag.is_some() { TAG } else { 0 };
        add_range(segments, payload, ADDRESSES + taken, usize::MAX)?;
        let put = if tagged { TAG } else { 0 };
        let mut frame = self.same;
        frame.first = u32::try_from(start).ok()?;
        frame.count = u32::try_from(segments.len() - start).ok()?;
        frame.bytes = u32::try_from(frame.bytes as usize + put - taken).ok()?;
        for field in [&mut frame.header.csum_start, &mut frame.header.hdr_len] {
            if *field > 0 {
                *field = u16::try_from((usize::from(*field) + put).saturating_sub(taken)).ok()?;
            }
        }
        Some(frame)
    }
}

/// Appends bytes `from..to` of the piece of `segments` at `range`.
fn add_range(
    segments: &mut Segments,
    range: core::ops::Range<usize>,
    from: usize,
    to: usize,
) -> Option<()> {
    let mut at = 0;
    for index in range {
        let segment = segments.as_slice()[index];
        let (start, end) = (at, at + segment.len());
        at = end;
        if end <= from || start >= to {
            continue;
        }
        let piece = segment.skip(from.saturating_sub(start));
        let piece = piece.take(end.min(to) - start.max(from));
        segments.push(piece).then_some(())?;
    }
    Some(())
}

#[cfg(test)]
mod tests;
