//! A learning L2 switch: which ports the frames of a burst go to, and in which form.
//!
//! It looks at the first bytes of each frame, once, and moves no payload: a tag is put in or taken
//! out by listing other segments. Ports are numbers; what stands behind them is the engine's
//! business. Any number of workers may use one switch at the same time.

mod fdb;
mod filter;
mod forms;
mod vlan;

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::memory::{Bounce, Segment, Segments, copy};

use super::net::{BURST_FRAMES_MAX, Cast, DropReason, Frame, Verdict, VnetHeader};
use super::offload::{HEADERS_MAX, NEEDS_CSUM};

use fdb::{Fdb, Station};
pub use filter::Filter;
use forms::{Forms, add_range, measure};
pub use vlan::{VLAN_MAX, VlanMode, VlanSet};

/// Ports of a switch at most: the bits of a word.
pub const PORTS_MAX: usize = 64;

/// Where addresses end and the type, or the tag, begins.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
const ETHERNET: usize = 14;
const TYPE_VLAN: u16 = 0x8100;
/// Of a provider's tag, IEEE 802.1ad.
const TYPE_SERVICE_VLAN: u16 = 0x88a8;
/// Priority and drop eligibility in a tag.
const PRIORITY: u16 = 0xf000;
/// Bytes of a frame that are always looked at: addresses, and the type or the tag.
const FRONT: usize = 16;
/// How many frames ahead the first lines are asked for.
const PREFETCH_FRAMES: usize = 8;
/// Bytes between the fronts of frames: a line of the cache.
const PLACE: usize = 64;
/// Bytes of a frame that a filter looks at: Ethernet, one tag, IPv6, and a message of neighbour
/// discovery with five options.
const LOOK: usize = 128;

/// What is chosen about a port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortRules {
    /// Its VLANs.
    pub vlan: VlanMode,
    /// Nothing passes between two isolated ports.
    pub isolated: bool,
    /// Frames for all (broadcast, multicast, unknown stations) that it may send in a second.
    pub flood_limit: Option<u32>,
    /// Longest IP packet that it is given, in bytes; of what is still to be segmented, the longest
    /// segment with its headers.
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
    /// What a frame says of itself decides about more than the port that it reaches: the receiver
    /// must be given what was looked at, whatever the sender writes over it meanwhile.
    strict: bool,
    /// Bytes of a frame that every port takes, whatever is to become of it.
    fits_all: usize,
}

/// Where the frames of one burst go.
#[derive(Debug)]
pub struct Ways {
    /// All of them go to this port and to no other, as they came: no share is made then.
    pub whole: Option<u16>,
    /// The ports that have a share.
    pub ports: u64,
    /// Where the burst came in.
    from: u16,
    /// Ports in whose share are frames for all that they are not given: these are dropped already.
    refused: u64,
    /// What each port is given, in the form that it gives it, in the order of the frames.
    shares: Box<[Vec<Frame>]>,
    /// Frames that go to one port alone: the port, and the frame's index in the burst.
    alone: Vec<(u16, u16)>,
    /// The front of frames, as it was when it was looked at, and tags put in.
    fronts: Bounce,
    /// The same of frames that a filter was asked about.
    filtered: Bounce,
    tags: Bounce,
    tags_used: usize,
    /// The headers of frames that are to be segmented, as they were looked at; there once one was.
    heads: Option<Bounce>,
}

impl Ways {
    /// No way yet; room for a burst that goes to every one of `ports` ports.
    pub fn new(ports: usize) -> Ways {
        Ways {
            whole: None,
            ports: 0,
            from: 0,
            refused: 0,
            shares: (0..ports)
                .map(|_| Vec::with_capacity(BURST_FRAMES_MAX))
                .collect(),
            alone: Vec::with_capacity(BURST_FRAMES_MAX),
            fronts: Bounce::new(BURST_FRAMES_MAX * PLACE),
            filtered: Bounce::new(BURST_FRAMES_MAX * LOOK),
            tags: Bounce::new(BURST_FRAMES_MAX * TAG),
            tags_used: 0,
            heads: None,
        }
    }

    /// The frames for `port`.
    pub fn share(&mut self, port: usize) -> &mut [Frame] {
        &mut self.shares[port]
    }

    /// The frames of the burst, by index, that go to `port` alone.
    pub fn alone_for(&self, port: usize) -> impl Iterator<Item = usize> {
        let own = self
            .alone
            .iter()
            .filter(move |way| usize::from(way.0) == port);
        own.map(|way| usize::from(way.1))
    }

    fn clear(&mut self) {
        let mut ports = core::mem::take(&mut self.ports);
        while ports != 0 {
            self.shares[ports.trailing_zeros() as usize].clear();
            ports &= ports - 1;
        }
        self.whole = None;
        self.refused = 0;
        self.alone.clear();
        self.tags_used = 0;
    }

    #[inline]
    fn push(&mut self, port: u16, frame: Frame) {
        self.ports |= 1 << port;
        self.shares[usize::from(port)].push(frame);
    }

    /// Room for the headers of frame `index`.
    fn head(&mut self, index: usize) -> Segment {
        let heads = self
            .heads
            .get_or_insert_with(|| Bounce::new(BURST_FRAMES_MAX * HEADERS_MAX));
        heads.segment().skip(index * HEADERS_MAX).take(HEADERS_MAX)
    }

    /// A frame for all that `port` is not given.
    fn refuse(&mut self, port: u16, mut frame: Frame, reason: DropReason) {
        frame.verdict = Verdict::Dropped(reason);
        self.refused |= 1 << port;
        self.push(port, frame);
    }

    /// Whether `port` is not given all of its share.
    #[inline]
    pub fn is_refused(&self, port: usize) -> bool {
        self.refused >> port & 1 != 0
    }

    /// A segment with a tag: VLAN number and priority.
    fn tag(&mut self, tag: u16) -> Option<Segment> {
        let place = self.tags.segment().skip(self.tags_used).take(TAG);
        let [high, low] = tag.to_be_bytes();
        let [kind, of_tag] = TYPE_VLAN.to_be_bytes();
        self.tags_used += TAG;
        (copy::write(&[place], 0, &[kind, of_tag, high, low]) == TAG).then_some(place)
    }
}

/// The front of a frame: addresses as numbers, and what follows them.
#[derive(Debug, Clone, Copy)]
struct Front {
    to: u64,
    from: u64,
    kind: u16,
    tci: u16,
    /// The type behind the tag, where there is one and it was looked at.
    behind: u16,
}

impl Front {
    /// From the first bytes of a frame, as little-endian words.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields of a word")]
    fn new([low, high]: [u64; 2]) -> Front {
        let (low, high) = (low.swap_bytes(), high.swap_bytes());
        Front {
            to: low >> 16,
            from: (low & 0xffff) << 32 | high >> 32,
            kind: (high >> 16) as u16,
            tci: high as u16,
            behind: 0,
        }
    }

    /// Reads the front of `frame`, which may be cut anywhere.
    #[inline]
    fn read(frame: &Frame, segments: &Segments) -> Option<[u64; 2]> {
        let payload = frame.payload(segments);
        if let Some(front) = payload.first().and_then(copy::front) {
            return Some(front);
        }
        let mut bytes = [0; FRONT];
        let len = copy::read(payload, 0, &mut bytes);
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[at + i]));
        (len >= ETHERNET).then(|| [word(0), word(8)])
    }

    /// VLAN number of the tag, if there is one (0: a priority only).
    #[inline]
    fn tag(&self) -> Option<u16> {
        (self.kind == TYPE_VLAN).then_some(self.tci & 0xfff)
    }

    /// Priority of the tag, in its place.
    fn priority(&self) -> u16 {
        self.tag().map_or(0, |_| self.tci & PRIORITY)
    }

    /// Up to the type, or the type behind the tag.
    #[inline]
    fn bytes(&self) -> usize {
        ETHERNET + if self.kind == TYPE_VLAN { TAG } else { 0 }
    }

    /// Whether another tag comes after the first.
    fn is_tagged_twice(&self) -> bool {
        self.tag().is_some() && [TYPE_VLAN, TYPE_SERVICE_VLAN].contains(&self.behind)
    }
}

/// Whether an address is that of a group, or of all.
#[inline]
fn is_group(mac: u64) -> bool {
    mac >> 40 & 1 != 0
}

/// Who a frame to that address is for.
#[inline]
fn cast(mac: u64) -> Cast {
    match mac {
        0xffff_ffff_ffff => Cast::Broadcast,
        _ if is_group(mac) => Cast::Multicast,
        _ => Cast::Unicast,
    }
}

/// Stations of all ports of a switch that are there for good, at most. One in two VLANs counts
/// twice.
pub const STATIONS_MAX: usize = 1 << 16;

/// Seconds after which a switch forgets a station that it has not seen (IEEE 802.1Q's default).
pub const AGEING: u32 = 300;

impl Switch {
    /// A switch with these ports, [`PORTS_MAX`] at most, that forgets stations after `ageing`
    /// seconds.
    pub fn new(ports: Vec<PortRules>, ageing: u32) -> Switch {
        let mut table = Fdb::new(ageing);
        for (port, rules) in (0..).zip(&ports) {
            for &mac in &rules.stations {
                for vlan in rules.vlans() {
                    table.fix(Station::of(vlan, mac), port);
                }
            }
        }
        let alike = |rules: &PortRules| {
            rules.filter.is_empty()
                && rules.vlan == ports[0].vlan
                && matches!(rules.vlan, VlanMode::Access(_))
        };
        let mtus = ports.iter().filter_map(|rules| rules.mtu);
        Switch {
            strict: !ports.iter().all(alike),
            fits_all: mtus
                .min()
                .map_or(usize::MAX, |mtu| ETHERNET + usize::from(mtu)),
            budgets: ports.iter().map(|_| FloodBudget::default()).collect(),
            ports: ports.into_boxed_slice(),
            table,
        }
    }

    /// Number of its ports.
    pub fn ports(&self) -> usize {
        self.ports.len()
    }

    /// Finds the ways of `frames`, which came in at `port` at second `now`: either all to one port
    /// ([`Ways::whole`]), or each in the shares of its ports. In shares, a frame that may not come
    /// in is dropped; of the others the verdict is as good as sent. Other forms of frames are added
    /// to `segments`.
    pub fn route(
        &self,
        port: u16,
        now: u32,
        frames: &mut [Frame],
        segments: &mut Segments,
        ways: &mut Ways,
    ) {
        ways.clear();
        ways.from = port;
        let (whole, to) = self.route_alike(port, now, frames, segments, ways);
        if whole == frames.len() {
            ways.whole = to;
            return;
        }
        for (index, frame) in (0..).zip(frames) {
            if frame.verdict != Verdict::Retry {
                continue;
            }
            let answer = match to {
                Some(to) if usize::from(index) < whole => {
                    ways.alone.push((to, index));
                    ways.push(to, *frame);
                    Ok(())
                }
                _ => self.route_one((port, index), now, frame, segments, ways),
            };
            frame.verdict = match answer {
                Ok(()) => Verdict::Sent,
                Err(reason) => Verdict::Dropped(reason),
            };
        }
    }

    /// How many of the first frames go to one and the same port as they came, and to which.
    fn route_alike(
        &self,
        port: u16,
        now: u32,
        frames: &mut [Frame],
        segments: &mut Segments,
        ways: &Ways,
    ) -> (usize, Option<u16>) {
        let rules = &self.ports[usize::from(port)];
        // An access port: there is no tag to be taken out or put in.
        let VlanMode::Access(vlan) = rules.vlan else {
            return (0, None);
        };
        if !rules.filter.is_empty() {
            return (0, None);
        }
        let mut way = None;
        // Senders and receivers come in runs.
        let mut last = [u64::MAX; 2];
        for index in 0..frames.len() {
            if let Some(ahead) = frames.get(index + PREFETCH_FRAMES)
                && let Some(segment) = segments.as_slice().get(ahead.first as usize)
            {
                copy::prefetch_read(segment);
            }
            let frame = &mut frames[index];
            let words = Front::read(frame, segments);
            let Some(front) = words.map(Front::new) else {
                return (index, way);
            };
            if frame.verdict != Verdict::Retry
                || front.kind == TYPE_VLAN
                || !is_behind(ETHERNET, &frame.header)
            {
                return (index, way);
            }
            if front.from != last[0] {
                self.learn(vlan, front.from, port, now);
                last[0] = front.from;
            }
            if front.to != last[1] {
                let to = self.find(vlan, front.to, now);
                let to = to.filter(|&to| self.takes_alike(port, to, vlan));
                if to.is_none() || way.is_some_and(|way| Some(way) != to) {
                    return (index, way);
                }
                (way, last[1]) = (to, front.to);
            }
            if self.strict
                && !words.is_some_and(|words| pin(frame, index, words, 0, segments, ways))
            {
                return (index, way);
            }
        }
        (frames.len(), way)
    }

    /// Whether `to` takes every frame of `vlan` that comes from `port`, without a tag.
    #[inline]
    fn takes_alike(&self, port: u16, to: u16, vlan: u16) -> bool {
        let (source, target) = (&self.ports[usize::from(port)], &self.ports[usize::from(to)]);
        to != port
            && target.mtu.is_none()
            && !(source.isolated && target.isolated)
            && target.vlan.egress(vlan) == Some(false)
    }

    #[inline]
    fn learn(&self, vlan: u16, from: u64, port: u16, now: u32) {
        // A group can't send.
        if !is_group(from) {
            self.table.learn(Station::new(vlan, from), port, now);
        }
    }

    /// The port of a station; `None` when it is unknown, or is a group.
    #[inline]
    fn find(&self, vlan: u16, to: u64, now: u32) -> Option<u16> {
        if is_group(to) {
            return None;
        }
        self.table.find(Station::new(vlan, to), now)
    }

    /// Nobody receives at `port`, which `frames` were to go to alone: forgets that the stations
    /// that they are for were seen there.
    #[cold]
    pub fn forget(&self, port: u16, frames: &[Frame], segments: &Segments, ways: &Ways) {
        let rules = &self.ports[usize::from(ways.from)];
        for frame in frames {
            if let Some(words) = Front::read(frame, segments)
                && let front = Front::new(words)
                && let Some(vlan) = rules.vlan.ingress(front.tag())
            {
                self.table.forget(Station::new(vlan, front.to), port);
            }
        }
    }

    fn route_one(
        &self,
        (port, index): (u16, u16),
        now: u32,
        frame: &mut Frame,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<(), DropReason> {
        let rules = &self.ports[usize::from(port)];
        let front = self.look(rules, usize::from(index), frame, segments, ways)?;
        let vlan = rules.vlan.ingress(front.tag()).ok_or(DropReason::Vlan)?;
        self.learn(vlan, front.from, port, now);
        frame.cast = cast(front.to);
        let is_measured = frame.header.gso_type != 0 && frame.bytes as usize > self.fits_all;
        let headers = is_measured
            .then(|| measure(frame, index.into(), segments, ways))
            .flatten();
        let mut forms = Forms {
            vlan,
            same: *frame,
            tag: front.tag(),
            priority: front.priority(),
            keeps_tag: front.is_tagged_twice(),
            headers,
            made: [None; 2],
        };
        match self.find(vlan, front.to, now) {
            // Its own segment has it already.
            Some(to) if to == port => Err(DropReason::NoPort),
            Some(to) => {
                self.send(port, to, &mut forms, segments, ways)?;
                ways.alone.push((to, index));
                Ok(())
            }
            None => self.flood(port, now, &mut forms, segments, ways),
        }
    }

    /// Reads the front of a frame and asks the filter of its port.
    fn look(
        &self,
        rules: &PortRules,
        index: usize,
        frame: &mut Frame,
        segments: &mut Segments,
        ways: &Ways,
    ) -> Result<Front, DropReason> {
        if !rules.filter.is_empty() {
            return self.filter(rules, index, frame, segments, ways);
        }
        let words = Front::read(frame, segments).ok_or(DropReason::BadFrame)?;
        let mut front = Front::new(words);
        if front.kind == TYPE_VLAN {
            let mut behind = [0; 2];
            if copy::read(frame.payload(segments), FRONT, &mut behind) < behind.len() {
                return Err(DropReason::BadFrame);
            }
            front.behind = u16::from_be_bytes(behind);
        }
        if !is_behind(front.bytes(), &frame.header) {
            return Err(DropReason::BadVnetHeader);
        }
        if self.strict && !pin(frame, index, words, front.behind, segments, ways) {
            return Err(DropReason::TooBig);
        }
        Ok(front)
    }

    /// As `look`, where there is a filter: it is asked about bytes that are ours, and those are
    /// what the receiver is given.
    #[cold]
    fn filter(
        &self,
        rules: &PortRules,
        index: usize,
        frame: &mut Frame,
        segments: &mut Segments,
        ways: &Ways,
    ) -> Result<Front, DropReason> {
        let mut bytes = [0; LOOK];
        let len = copy::read(frame.payload(segments), 0, &mut bytes);
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| bytes[at + i]));
        let mut front = Front::new([word(0), word(8)]);
        let bytes_of_front = front.bytes();
        if len < bytes_of_front {
            return Err(DropReason::BadFrame);
        }
        front.behind = u16::from_be_bytes([bytes[FRONT], bytes[FRONT + 1]]);
        let from = core::array::from_fn(|i| bytes[6 + i]);
        let rest = &bytes[bytes_of_front - 2..len];
        if !rules.filter.allows(from, rest) {
            return Err(DropReason::Spoofed);
        }
        if !is_behind(bytes_of_front, &frame.header)
            || csum_end(&frame.header).is_some_and(|end| {
                !rules
                    .filter
                    .lets_be_written(rest, end - (bytes_of_front - 2))
            })
        {
            return Err(DropReason::BadVnetHeader);
        }
        let place = ways.filtered.segment().skip(index * LOOK).take(len);
        copy::write(&[place], 0, &bytes[..len]);
        put_front(frame, place, segments).ok_or(DropReason::TooBig)?;
        Ok(front)
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
        let mut answer = Err(DropReason::NoPort);
        for (to, rules) in (0..).zip(&self.ports) {
            if to == port || rules.vlan.egress(forms.vlan).is_none() {
                continue;
            }
            // What one port can't take is no reason to withhold it from the others: lost there.
            if let Err(reason) = self.send(port, to, forms, segments, ways) {
                ways.refuse(to, forms.same, reason);
            }
            answer = Ok(());
        }
        answer
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
        if target
            .mtu
            .is_some_and(|mtu| forms.packet_bytes() > mtu.into())
        {
            return Err(DropReason::Mtu);
        }
        let frame = forms.get(tagged, segments, ways)?;
        ways.push(to, frame);
        Ok(())
    }
}

impl PortRules {
    /// The VLANs that its frames may belong to, each once.
    pub fn vlans(&self) -> Vec<u16> {
        match &self.vlan {
            VlanMode::Access(vlan) => vec![*vlan],
            VlanMode::Trunk { allowed, native } => {
                let more = native.filter(|&vlan| !allowed.contains(vlan));
                allowed.iter().chain(more).collect()
            }
        }
    }
}

/// Where the checksum ends that a receiver, or we for it, will write into the frame.
fn csum_end(header: &VnetHeader) -> Option<usize> {
    let asks = header.flags & NEEDS_CSUM != 0;
    asks.then(|| usize::from(header.csum_start) + usize::from(header.csum_offset) + 2)
}

/// Whether the checksum that `header` asks for lies behind the first `front` bytes. The sender
/// chooses what comes of it, and it is written after these were looked at.
#[inline]
fn is_behind(front: usize, header: &VnetHeader) -> bool {
    header.flags & NEEDS_CSUM == 0 || usize::from(header.csum_start) >= front
}

/// Puts the front of a frame as it was looked at, `words` and the type `behind` a tag, in the place
/// of what the sender may still change. `false` when there is no room for that.
#[inline]
fn pin(
    frame: &mut Frame,
    index: usize,
    words: [u64; 2],
    behind: u16,
    segments: &mut Segments,
    ways: &Ways,
) -> bool {
    let tagged = Front::new(words).kind == TYPE_VLAN;
    let len = if tagged { FRONT + 2 } else { FRONT };
    let place = ways.fronts.segment().skip(index * PLACE);
    let place = place.take(len.min(frame.bytes as usize));
    copy::put_front(&place, words);
    if tagged {
        copy::write(&[place], FRONT, &behind.to_be_bytes());
    }
    put_front(frame, place, segments).is_some()
}

/// Lists `frame` anew with `place` instead of its first bytes.
#[inline]
fn put_front(frame: &mut Frame, place: Segment, segments: &mut Segments) -> Option<()> {
    let first = frame.first as usize;
    let start = segments.len();
    segments.push(place).then_some(())?;
    let payload = first..first + frame.count as usize;
    add_range(segments, payload, place.len(), usize::MAX)?;
    frame.first = u32::try_from(start).ok()?;
    frame.count = u32::try_from(segments.len() - start).ok()?;
    Some(())
}

#[cfg(test)]
mod tests;
