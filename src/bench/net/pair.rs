//! One queue pair under load: frames out, frames in, and what became of them.
//!
//! Buffer `i` of a ring is always that of id `i`. Header and addresses of a frame are written once;
//! per frame there are four words in the first cache line of its buffer: a number, the time, a word
//! that has to fit the number, and the length with the number of the queue.

use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::BenchError;
use super::super::histogram::Histogram;
use super::super::memory::{LINE, TO_UVA};
use super::super::ring::{Buffer, LoadRing, NotInFlight, Setup};
use super::layout::{FRAME_AT, Layout, Place};
use super::tcp::head;
use crate::config::{BenchMode, BenchNetConfig, FrameSize};
use crate::memory::{Area, GuestRam, MemoryError};
use crate::ring::Desc;

/// Frames per look at a ring, and per publication.
pub(super) const TURN: u16 = 32;
/// Of so many frames one is looked at in a flood; a power of two.
const SAMPLE: u64 = 16;

/// Where in a buffer the words of a frame are: after the header and the two addresses, aligned.
const NUMBER_AT: usize = 32;
const TIME_AT: usize = 40;
const CHECK_AT: usize = 48;
const LENGTH_AT: usize = 56;
/// Where in a received buffer the header's number of buffers is.
pub(super) const BUFFERS_AT: usize = 10;
/// A word that no zeroed or foreign buffer has in common with a number.
const MAGIC: u64 = 0x7672_696e_6764_626e;

/// Who sends frames, and who sends them back from the far end: locally administered addresses.
pub(super) const NEAR: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const FAR: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Frame lengths of the mix, in bytes.
const MIX: [u16; 12] = [64, 590, 64, 64, 590, 64, 1518, 64, 590, 64, 64, 590];

/// Counts over all pairs.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Frames sent.
    pub sent: u64,
    /// Frames received.
    pub received: u64,
    /// Bytes of the frames received, without headers.
    pub bytes: u64,
    /// Frames looked at that are not what was sent, or came out of order.
    pub mismatched: u64,
    /// Kicks that the back-end asked for.
    pub kicks: u64,
    /// Times there and back, in nanoseconds.
    pub latency: Histogram,
}

/// The greatest length of a frame, in bytes.
pub(super) fn longest(size: FrameSize) -> u16 {
    match size {
        FrameSize::Fixed(bytes) => bytes,
        FrameSize::Mix => MIX.into_iter().fold(0, u16::max),
    }
}

/// Writes the addresses of a frame that begins at `at`.
#[inline]
pub(super) fn address(buffers: &Area, at: usize, to: [u8; 6], from: [u8; 6]) {
    let word = |bytes| u32::from_le_bytes(bytes);
    buffers.store32(at, word([to[0], to[1], to[2], to[3]]));
    buffers.store32(at + 4, word([to[4], to[5], from[0], from[1]]));
    buffers.store32(at + 8, word([from[2], from[3], from[4], from[5]]));
}

/// A ring, its buffers and its eventfds.
#[derive(Debug)]
pub(super) struct Side<R> {
    pub ring: R,
    pub buffers: Area,
    pub place: Place,
    tables: Option<Tables>,
    kick: EventFd,
    call: EventFd,
}

impl<R: LoadRing> Side<R> {
    fn new(ram: &Arc<GuestRam>, setup: &Setup, place: Place) -> Result<Side<R>, BenchError> {
        let areas = || -> Result<(R, Area, Option<Tables>), MemoryError> {
            let mut ring = R::new(ram, setup)?;
            let bytes = place.stride * usize::from(setup.size);
            let buffers = ram.area(place.buffers_at(), bytes, 64)?;
            let tables = place
                .tables
                .map(|at| Tables::new(&mut ring, ram, setup, at));
            Ok((ring, buffers, tables.transpose()?))
        };
        let (ring, buffers, tables) = areas().map_err(BenchError::Memory)?;
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BenchError::Eventfd);
        Ok(Side {
            ring,
            buffers,
            place,
            tables,
            kick: eventfd()?,
            call: eventfd()?,
        })
    }

    /// Receive and transmit ring of pair `number`, in their places of `ram`.
    ///
    /// # Errors
    /// When the places are not in `ram`, or there are no eventfds.
    pub(super) fn both(
        config: &BenchNetConfig,
        ram: &Arc<GuestRam>,
        layout: &Layout,
        number: u16,
    ) -> Result<[Side<R>; 2], BenchError> {
        let side = |write: bool| {
            let place = layout.place(2 * usize::from(number) + usize::from(!write));
            let setup = Setup {
                size: config.ring_size,
                event_idx: config.event_idx,
                in_order: config.in_order,
                write,
                chain: 1,
                at: place.rings_at(),
            };
            Side::new(ram, &setup, place)
        };
        Ok([side(true)?, side(false)?])
    }

    /// Kick and call.
    pub(super) fn eventfds(&self) -> (&EventFd, &EventFd) {
        (&self.kick, &self.call)
    }

    /// Kicks: buffers were posted before the back-end could ask for it.
    pub(super) fn wake(&self) {
        let _ = self.kick.write(1);
    }

    /// Posts every buffer of a receive ring.
    pub(super) fn post_all(&mut self) {
        while let Some(id) = self.ring.ids().take() {
            self.post(id, self.place.capacity);
        }
        // Nobody listens yet: whether a kick is wanted is known once the back-end runs.
        let _ = self.ring.publish();
    }

    /// Offset of a buffer in `buffers`.
    #[inline]
    pub(super) fn at(&self, id: u16) -> usize {
        usize::from(id) * self.place.stride
    }

    #[inline]
    pub(super) fn post(&mut self, id: u16, len: u32) {
        self.post_at(id, self.place.buffers + self.at(id) as u64, len);
    }

    /// The same, of a buffer somewhere else.
    #[inline]
    pub(super) fn post_at(&mut self, id: u16, addr: u64, len: u32) {
        match &self.tables {
            None => self.ring.post(id, addr, len),
            Some(tables) => {
                tables.fill::<R>(id, addr, len);
                self.ring.post_chain(id);
            }
        }
    }

    #[inline]
    pub(super) fn publish(&mut self, tally: &mut Tally) {
        if self.ring.publish() {
            tally.kicks += 1;
            // A full counter has a kick pending already.
            let _ = self.kick.write(1);
        }
    }
}

/// The tables of indirect descriptors, one for each id: virtio-net header and frame.
#[derive(Debug)]
struct Tables {
    area: Area,
    /// Of each entry.
    flags: u16,
}

/// Entries of a table, their bytes, and those of all.
const TABLE_ENTRIES: u16 = 2;
const ENTRY_BYTES: usize = 16;
const TABLE_BYTES: u32 = 32;

impl Tables {
    /// Tables that begin at the guest physical address `at`, with a descriptor of each in `ring`.
    fn new<R: LoadRing>(
        ring: &mut R,
        ram: &Arc<GuestRam>,
        setup: &Setup,
        at: u64,
    ) -> Result<Tables, MemoryError> {
        let area = ram.area(at + TO_UVA, LINE * usize::from(setup.size), LINE)?;
        for id in 0..setup.size {
            let table = Buffer {
                addr: at + u64::from(id) * LINE as u64,
                len: TABLE_BYTES,
                flags: Desc::INDIRECT,
            };
            ring.set_chain(id, &[table]);
        }
        Ok(Tables {
            area,
            flags: if setup.write { Desc::WRITE } else { 0 },
        })
    }

    /// Lists the `len` bytes at `addr`. What stands there already is not written again.
    #[inline]
    fn fill<R: LoadRing>(&self, id: u16, addr: u64, len: u32) {
        let head = len.min(u32::from(FRAME_AT));
        let parts = [(addr, head), (addr + u64::from(head), len - head)];
        for (index, (addr, len)) in (0..).zip(parts) {
            let flags = self.flags;
            let words = R::table_entry(index, TABLE_ENTRIES, &Buffer { addr, len, flags });
            let at = usize::from(id) * LINE + usize::from(index) * ENTRY_BYTES;
            for (at, word) in [at, at + 8].into_iter().zip(words) {
                if self.area.load64(at) != word {
                    self.area.store64(at, word);
                }
            }
        }
    }
}

/// What a port at either end has of each of its queue pairs.
pub(super) trait QueuePair {
    type Ring: LoadRing;

    /// The receive and the transmit ring.
    fn sides(&self) -> [&Side<Self::Ring>; 2];

    /// Their eventfds: kick and call each.
    fn eventfds(&self) -> [(&EventFd, &EventFd); 2] {
        self.sides().map(Side::eventfds)
    }

    /// Kicks both, once.
    fn wake(&self) {
        self.sides().into_iter().for_each(Side::wake);
    }
}

impl<R: LoadRing> QueuePair for Pair<R> {
    type Ring = R;

    fn sides(&self) -> [&Side<R>; 2] {
        [&self.rx, &self.tx]
    }
}

/// A queue pair.
#[derive(Debug)]
pub(super) struct Pair<R> {
    rx: Side<R>,
    tx: Side<R>,
    lengths: Box<[u16]>,
    /// Nothing is awaited but that the back-end takes what is sent.
    one_way: bool,
    /// Then the length of the frame with each id.
    on_way: Box<[u16]>,
    /// Place in `lengths` of the next frame.
    turn: usize,
    number: u64,
    in_flight: u16,
    /// Fewer frames than this are not worth a publication.
    least: u16,
    /// Look at one frame of this many, minus one.
    sample: u64,
    mergeable: bool,
    /// Buffers to come of a frame that takes several.
    continued: u16,
    sent: u64,
    received: u64,
    /// Frames that are not waited for any more, and the first number sent after them.
    written_off: u64,
    awaited_from: u64,
    /// The least number that a frame may have that is looked at next.
    next_number: u64,
    start: Instant,
}

impl<R: LoadRing> Pair<R> {
    /// Pair `queue` in its places of `ram`, all receive buffers posted, of a device whose first is
    /// pair number `first` of all. Times count from `start`.
    ///
    /// # Errors
    /// When the places are not in `ram`, or there are no eventfds.
    pub(super) fn new(
        config: &BenchNetConfig,
        ram: &Arc<GuestRam>,
        layout: &Layout,
        queue: u16,
        first: u64,
        start: Instant,
    ) -> Result<Pair<R>, BenchError> {
        let [rx, tx] = Side::both(config, ram, layout, queue)?;
        let in_flight = layout.in_flight(config);
        let mut pair = Pair {
            rx,
            tx,
            lengths: match config.size {
                FrameSize::Fixed(bytes) => [bytes].into(),
                FrameSize::Mix => MIX.into(),
            },
            one_way: config.mode == BenchMode::Send,
            on_way: vec![0; usize::from(config.ring_size)].into(),
            turn: 0,
            number: first + u64::from(queue),
            in_flight,
            least: (in_flight / 8).clamp(1, TURN),
            sample: match config.mode {
                BenchMode::Flood | BenchMode::Send => SAMPLE - 1,
                BenchMode::PingPong => 0,
            },
            mergeable: config.mergeable,
            continued: 0,
            sent: 0,
            received: 0,
            written_off: 0,
            awaited_from: 0,
            next_number: 0,
            start,
        };
        pair.fill(config);
        pair.rx.post_all();
        Ok(pair)
    }

    /// Addresses of the frames: a broadcast is forwarded by whoever forwards at all, and with a
    /// port at the far end there is somebody to send to. Who only takes frames gets those for a
    /// station that is not there.
    fn fill(&mut self, config: &BenchNetConfig) {
        let to = if config.far.is_some() || self.one_way {
            FAR
        } else {
            [0xff; 6]
        };
        for id in 0..config.ring_size {
            let at = self.tx.at(id) + usize::from(FRAME_AT);
            if config.tso {
                // All frames have one length.
                self.put_head(id, self.lengths[0]);
                continue;
            }
            address(&self.tx.buffers, at, to, NEAR);
            // EtherType 0x88b5, which is for local experiments (IEEE 802).
            self.tx.buffers.store16(at + 12, 0xb588);
        }
    }

    /// Frames that were sent and did not come back.
    pub(super) fn missing(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }

    /// Whether no frame ever came back.
    pub(super) fn is_dead(&self) -> bool {
        self.received == 0
    }

    /// Waits no longer for the frames that are missing.
    pub(super) fn write_off(&mut self) {
        self.written_off = self.missing();
        self.awaited_from = self.sent;
    }

    /// Writes the head of a frame that the back-end has to cut.
    fn put_head(&self, id: u16, length: u16) {
        let at = self.tx.at(id);
        let words = head(length);
        for (index, word) in words.as_chunks::<2>().0.iter().enumerate() {
            let word = u16::from_le_bytes(*word);
            self.tx.buffers.store16(at + 2 * index, word);
        }
    }

    /// What the back-end took is all that is seen of a frame that does not come back.
    fn take_back(&mut self, tally: &mut Tally) -> Result<(), NotInFlight> {
        let mut frames = 0;
        while frames < u64::from(TURN)
            && let Some((id, _)) = self.tx.ring.used()?
        {
            self.tx.ring.ids().put(id);
            tally.bytes += u64::from(self.on_way[usize::from(id)]);
            frames += 1;
        }
        tally.received += frames;
        self.received += frames;
        Ok(())
    }

    /// Takes what came back, up to a turn's worth.
    ///
    /// # Errors
    /// When the device breaks the rules of its ring.
    #[inline]
    pub(super) fn receive(&mut self, tally: &mut Tally) -> Result<(), NotInFlight> {
        if self.one_way {
            return self.take_back(tally);
        }
        // All before the first is looked at: their headers come from the other core at once.
        let (mut used, mut buffers) = ([(0, 0); TURN as usize], 0);
        while buffers < used.len()
            && let Some(buffer) = self.rx.ring.used()?
        {
            if self.mergeable {
                self.rx.buffers.prefetch(self.rx.at(buffer.0));
            }
            used[buffers] = buffer;
            buffers += 1;
        }
        let (mut frames, mut now) = (0, None);
        for &(id, written) in &used[..buffers] {
            tally.bytes += u64::from(written);
            if self.continued > 0 {
                self.continued -= 1;
            } else {
                frames += 1;
                if self.mergeable {
                    let count = self.rx.buffers.load16(self.rx.at(id) + BUFFERS_AT);
                    self.continued = count.saturating_sub(1);
                }
                if (self.received + frames) & self.sample == 0 {
                    let now = *now.get_or_insert_with(|| nanos(self.start));
                    self.look(id, written, now, tally);
                }
            }
            self.rx.post(id, self.rx.place.capacity);
        }
        if buffers > 0 {
            tally.bytes = tally.bytes.saturating_sub(frames * u64::from(FRAME_AT));
            tally.received += frames;
            self.received += frames;
            self.rx.publish(tally);
        }
        Ok(())
    }

    /// Looks whether a frame is one of ours, whole, and later than those before it.
    fn look(&mut self, id: u16, written: u32, now: u64, tally: &mut Tally) {
        let at = self.rx.at(id);
        let word = |offset| self.rx.buffers.load64(at + offset);
        let (number, time, length) = (word(NUMBER_AT), word(TIME_AT), word(LENGTH_AT));
        let whole = u64::from(written) == (length & 0xffff) + u64::from(FRAME_AT);
        let good = word(CHECK_AT) == number ^ MAGIC
            && length >> 16 == self.number
            && (whole || self.continued > 0)
            && (self.next_number..self.sent).contains(&number);
        if !good {
            tally.mismatched += 1;
            return;
        }
        self.next_number = number + 1;
        if number < self.awaited_from {
            // Late, not lost.
            self.written_off = 0;
        }
        tally.latency.record(now.saturating_sub(time));
    }

    /// Sends as many frames as may be in flight, up to a turn's worth.
    ///
    /// # Errors
    /// When the device breaks the rules of its ring.
    #[inline]
    pub(super) fn send(&mut self, tally: &mut Tally) -> Result<(), NotInFlight> {
        let awaited = self.missing().saturating_sub(self.written_off);
        let allowed = u64::from(self.in_flight).saturating_sub(awaited);
        if allowed < u64::from(self.least) {
            return Ok(());
        }
        let count = u16::try_from(allowed).unwrap_or(TURN).min(TURN);
        if self.tx.ring.ids().room() < count {
            while let Some((id, _)) = self.tx.ring.used()? {
                self.tx.ring.ids().put(id);
            }
        }
        let count = count.min(self.tx.ring.ids().room());
        if count == 0 {
            return Ok(());
        }
        let now = nanos(self.start);
        for _ in 0..count {
            if let Some(id) = self.tx.ring.ids().take() {
                self.send_one(id, now);
            }
        }
        tally.sent += u64::from(count);
        self.tx.publish(tally);
        Ok(())
    }

    #[inline]
    fn send_one(&mut self, id: u16, now: u64) {
        let length = self.lengths[self.turn];
        self.turn += 1;
        if self.turn == self.lengths.len() {
            self.turn = 0;
        }
        let (at, to) = (self.tx.at(id), &self.tx.buffers);
        if self.one_way {
            self.on_way[usize::from(id)] = length;
        } else {
            to.store64(at + NUMBER_AT, self.sent);
            to.store64(at + TIME_AT, now);
            to.store64(at + CHECK_AT, self.sent ^ MAGIC);
            to.store64(at + LENGTH_AT, u64::from(length) | self.number << 16);
        }
        self.sent += 1;
        self.tx.post(id, u32::from(length) + u32::from(FRAME_AT));
    }
}

/// Nanoseconds since `start`.
#[inline]
fn nanos(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
