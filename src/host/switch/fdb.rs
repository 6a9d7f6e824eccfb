//! `Fdb`: which station was last seen at which port.
//!
//! Any number of workers look up and learn at the same time without a lock. An entry is two words;
//! the second carries a check of the first, so that an entry half written by another worker is no
//! entry. What is lost to such a race is learned again with the next frame.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

/// Entries that share a line of the cache, and compete when it is full.
const WAYS: usize = 4;
/// Entries of a line that stations may have for good: the others are for those that are learned.
const FIXED_WAYS: usize = WAYS / 2;
/// Entries of the table.
const ENTRIES: usize = 16384;
/// A station that was seen less than so many seconds ago need not be written down again.
const REFRESH: u32 = 2;
/// The time of an entry that does not age.
const FOREVER: u32 = u32::MAX;

/// A station: VLAN and address. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Station(u64);

impl Station {
    /// `mac` is the address as a number of 48 bits.
    #[inline]
    pub(super) fn new(vlan: u16, mac: u64) -> Station {
        Station(1 << 63 | u64::from(vlan) << 48 | mac)
    }

    pub(super) fn of(vlan: u16, [a, b, c, d, e, f]: [u8; 6]) -> Station {
        Station::new(vlan, u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }
}

/// What a station's line follows from, with its address: chosen anew for each table, so that nobody
/// can pick addresses that share a line.
#[derive(Debug)]
struct Keys {
    mask: u64,
    factor: u64,
}

impl Keys {
    fn random() -> Keys {
        let random = RandomState::new();
        Keys {
            mask: random.hash_one(1),
            factor: random.hash_one(2) | 1,
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    fn hash(&self, station: Station) -> u64 {
        let wide = u128::from(station.0 ^ self.mask) * u128::from(self.factor);
        wide as u64 ^ (wide >> 64) as u64
    }
}

#[derive(Debug, Default)]
struct Entry {
    station: AtomicU64,
    /// Port in the low 16 bits, check of the station in the next, seconds in the high 32.
    value: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([Entry; WAYS]);

/// The forwarding table of a switch.
#[derive(Debug)]
pub(super) struct Fdb {
    lines: Box<[Line]>,
    keys: Keys,
    /// Ports of the stations for good whose lines have enough of those: asked when a line does not
    /// know a station, and never learned there.
    others: BTreeMap<u64, u16>,
    /// Seconds after which a station that was not seen is forgotten.
    ageing: u32,
}

impl Fdb {
    pub(super) fn new(ageing: u32) -> Fdb {
        Fdb {
            lines: (0..ENTRIES / WAYS).map(|_| Line::default()).collect(),
            keys: Keys::random(),
            others: BTreeMap::new(),
            ageing,
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "below the number of lines")]
    fn line(&self, hash: u64) -> &[Entry; WAYS] {
        &self.lines[hash as usize % self.lines.len()].0
    }

    #[inline]
    fn value(hash: u64, port: u16, time: u32) -> u64 {
        u64::from(port) | (hash >> 48 & 0xffff) << 16 | u64::from(time) << 32
    }

    /// Port and time, if the value belongs to the station with this hash.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields of one word")]
    fn read(hash: u64, value: u64) -> Option<(u16, u32)> {
        let check = value >> 16 & 0xffff;
        (check == hash >> 48 & 0xffff).then_some((value as u16, (value >> 32) as u32))
    }

    fn is_old(&self, seen: u32, now: u32) -> bool {
        seen != FOREVER && now.saturating_sub(seen) >= self.ageing
    }

    /// The port of `station`, if it is known and not too old.
    #[inline]
    pub(super) fn find(&self, station: Station, now: u32) -> Option<u16> {
        let hash = self.keys.hash(station);
        let known = |entry: &&Entry| entry.station.load(Relaxed) == station.0;
        let Some(entry) = self.line(hash).iter().find(known) else {
            return self.other(station);
        };
        let (port, seen) = Fdb::read(hash, entry.value.load(Relaxed))?;
        (!self.is_old(seen, now)).then_some(port)
    }

    /// The port of a station for good that is in no line.
    #[inline]
    fn other(&self, station: Station) -> Option<u16> {
        self.others.get(&station.0).copied()
    }

    /// `station` was seen at `port`.
    #[inline]
    pub(super) fn learn(&self, station: Station, port: u16, now: u32) {
        let hash = self.keys.hash(station);
        let line = self.line(hash);
        let known = |entry: &&Entry| entry.station.load(Relaxed) == station.0;
        match line.iter().find(known) {
            Some(entry) => {
                let there = Fdb::read(hash, entry.value.load(Relaxed));
                let same = there.is_some_and(|(at, seen)| {
                    seen == FOREVER || (at == port && now.saturating_sub(seen) < REFRESH)
                });
                if !same {
                    entry.value.store(Fdb::value(hash, port, now), Relaxed);
                }
            }
            None if self.other(station).is_some() => {}
            None => self.insert(hash, station, port, now),
        }
    }

    /// `station` is at `port` for good.
    pub(super) fn fix(&mut self, station: Station, port: u16) {
        let hash = self.keys.hash(station);
        let line = self.line(hash);
        if line.iter().any(|entry| entry.station() == station.0) {
            return;
        }
        let is_fixed = |entry: &&Entry| entry.station() != 0 && entry.seen() == FOREVER;
        if line.iter().filter(is_fixed).count() < FIXED_WAYS {
            self.insert(hash, station, port, FOREVER);
        } else {
            self.others.entry(station.0).or_insert(port);
        }
    }

    /// Writes down a station that its line does not know. It takes the place of nobody; of one of
    /// its own port; of one of the port that has the most in the line: who sends from many
    /// addresses makes the switch forget his own, and nobody else's. Among equals the one goes that
    /// was not seen for the longest.
    #[cold]
    fn insert(&self, hash: u64, station: Station, port: u16, time: u32) {
        let line = self.line(hash);
        let is_learned = |entry: &&Entry| entry.station() != 0 && entry.seen() != FOREVER;
        let at = |port| {
            line.iter()
                .filter(is_learned)
                .filter(move |e| e.port() == port)
        };
        // When one is put there for good, none is learned.
        let now = if time == FOREVER { 0 } else { time };
        let victim = line.iter().max_by_key(|entry| {
            let (seen, own) = (entry.seen(), entry.port() == port);
            match entry.station() {
                0 => (3, 0, 0),
                // Fewer than there are entries.
                _ if seen == FOREVER => (0, 0, 0),
                _ if self.is_old(seen, now) => (3, 0, 0),
                _ if own => (2, 0, now.saturating_sub(seen)),
                _ => (1, at(entry.port()).count(), now.saturating_sub(seen)),
            }
        });
        if let Some(entry) = victim {
            entry.value.store(0, Relaxed);
            entry.station.store(station.0, Relaxed);
            entry.value.store(Fdb::value(hash, port, time), Relaxed);
        }
    }

    /// Forgets that `station` was seen at `port`, unless it is there for good.
    pub(super) fn forget(&self, station: Station, port: u16) {
        let hash = self.keys.hash(station);
        let known = |entry: &&Entry| entry.station() == station.0;
        if let Some(entry) = self.line(hash).iter().find(known)
            && let Some((at, seen)) = Fdb::read(hash, entry.value.load(Relaxed))
            && at == port
            && seen != FOREVER
        {
            entry.station.store(0, Relaxed);
        }
    }
}

impl Entry {
    fn station(&self) -> u64 {
        self.station.load(Relaxed)
    }

    /// When the station was seen, if there is one.
    fn seen(&self) -> u32 {
        (self.value.load(Relaxed) >> 32) as u32
    }

    /// Where the station is, if there is one.
    #[expect(clippy::cast_possible_truncation, reason = "a field of a word")]
    fn port(&self) -> u16 {
        self.value.load(Relaxed) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn station(number: u32) -> Station {
        let [a, b, c, d] = number.to_be_bytes();
        Station::of(7, [2, 0, a, b, c, d])
    }

    #[test]
    fn stations_are_found_where_they_were_last_seen() {
        let fdb = Fdb::new(300);
        assert_eq!(fdb.find(station(1), 0), None);
        fdb.learn(station(1), 3, 10);
        assert_eq!(fdb.find(station(1), 10), Some(3));
        fdb.learn(station(1), 4, 10);
        assert_eq!(fdb.find(station(1), 10), Some(4), "it moved");
        assert_eq!(
            fdb.find(Station::of(8, [2, 0, 0, 0, 0, 1]), 10),
            None,
            "another VLAN"
        );
    }

    #[test]
    fn stations_age_unless_they_are_seen_again_or_fixed() {
        let mut fdb = Fdb::new(300);
        fdb.learn(station(1), 1, 0);
        fdb.learn(station(2), 2, 0);
        fdb.fix(station(3), 3);
        fdb.learn(station(2), 2, 200);
        assert_eq!(fdb.find(station(1), 299), Some(1));
        assert_eq!(fdb.find(station(1), 300), None);
        assert_eq!(fdb.find(station(2), 499), Some(2));
        assert_eq!(fdb.find(station(3), 1_000_000), Some(3));
        fdb.learn(station(3), 9, 5);
        assert_eq!(
            fdb.find(station(3), 5),
            Some(3),
            "it stays where it was put"
        );
    }

    #[test]
    fn a_full_table_forgets_the_oldest_and_stays_right() {
        let fdb = Fdb::new(300);
        let many = 3 * u32::try_from(ENTRIES).unwrap();
        for number in 0..many {
            fdb.learn(
                station(number),
                u16::try_from(number % 50).unwrap(),
                number / 1000,
            );
        }
        let mut known = 0;
        for number in 0..many {
            if let Some(port) = fdb.find(station(number), many / 1000) {
                assert_eq!(u32::from(port), number % 50);
                known += 1;
            }
        }
        assert!(known > ENTRIES / 2, "{known}");
    }

    /// Stations of one line.
    fn of_one_line(fdb: &Fdb, count: usize) -> Vec<Station> {
        let lines = u64::try_from(ENTRIES / WAYS).unwrap();
        let all = (0..1 << 20).map(station);
        let of_one = all.filter(|&station| fdb.keys.hash(station) % lines == 7);
        of_one.take(count).collect()
    }

    #[test]
    fn a_port_with_many_stations_makes_the_table_forget_its_own() {
        let fdb = Fdb::new(300);
        for quiet in 0..100 {
            fdb.learn(station(quiet), 1, 0);
        }
        for number in 0..100_000 {
            fdb.learn(station(1000 + number), 2, 1 + number / 1000);
        }
        for quiet in 0..100 {
            assert_eq!(fdb.find(station(quiet), 100), Some(1), "{quiet}");
        }
    }

    #[test]
    fn the_port_with_the_most_stations_in_a_line_makes_room_for_another() {
        let fdb = Fdb::new(300);
        let stations = of_one_line(&fdb, 6);
        for (at, port) in [1, 2, 2, 3].into_iter().enumerate() {
            fdb.learn(stations[at], port, u32::try_from(at).unwrap());
        }
        let found = |now| -> Vec<_> { stations.iter().map(|&s| fdb.find(s, now)).collect() };
        fdb.learn(stations[4], 4, 10);
        let known = [Some(1), None, Some(2), Some(3), Some(4), None];
        assert_eq!(found(10), known, "the older one of port 2");
        // Those that the switch would not find any more go first.
        fdb.learn(stations[3], 3, 200);
        fdb.learn(stations[4], 4, 200);
        fdb.learn(stations[2], 2, 200);
        fdb.learn(stations[5], 2, 310);
        let known = [None, None, Some(2), Some(3), Some(4), Some(2)];
        assert_eq!(found(310), known);
    }

    #[test]
    fn no_two_tables_have_the_same_lines() {
        let [one, other] = [Fdb::new(300), Fdb::new(300)];
        let alike = (0..1000)
            .map(station)
            .filter(|&station| one.keys.hash(station) % 4096 == other.keys.hash(station) % 4096);
        assert!(alike.count() < 20);
        let mut lines: Vec<_> = (0..4096)
            .map(|number| one.keys.hash(station(number)) % 4096)
            .collect();
        lines.sort_unstable();
        lines.dedup();
        assert!(lines.len() > 2000, "{} lines for 4096", lines.len());
    }

    #[test]
    fn no_station_that_is_fixed_is_lost_and_others_are_still_learned() {
        let mut fdb = Fdb::new(300);
        let stations = of_one_line(&fdb, 3 * WAYS);
        let (fixed, others) = stations.split_at(2 * WAYS);
        for (port, station) in (0..).zip(fixed) {
            fdb.fix(*station, port);
        }
        for (port, station) in (0..).zip(fixed) {
            assert_eq!(fdb.find(*station, 1_000_000), Some(port));
            fdb.learn(*station, 99, 5);
            assert_eq!(fdb.find(*station, 5), Some(port), "it stays there");
        }
        for other in others {
            fdb.learn(*other, 50, 10);
            assert_eq!(fdb.find(*other, 11), Some(50), "learned");
        }
        for (port, station) in (0..).zip(fixed) {
            assert_eq!(fdb.find(*station, 11), Some(port));
        }
    }

    #[test]
    fn more_stations_are_fixed_than_the_table_has_entries() {
        let mut fdb = Fdb::new(300);
        let many = 2 * u32::try_from(ENTRIES).unwrap();
        for number in 0..many {
            fdb.fix(station(number), u16::try_from(number % 50).unwrap());
        }
        for number in 0..many {
            let port = fdb.find(station(number), 9).map(u32::from);
            assert_eq!(port, Some(number % 50), "{number}");
        }
        for number in many..many + 1000 {
            fdb.learn(station(number), 60, 9);
            assert_eq!(fdb.find(station(number), 9), Some(60), "{number}");
        }
    }

    #[test]
    fn a_station_that_is_forgotten_is_unknown_unless_it_moved_or_is_fixed() {
        let mut fdb = Fdb::new(300);
        fdb.fix(station(1), 1);
        fdb.learn(station(2), 2, 10);
        fdb.forget(station(2), 3);
        assert_eq!(fdb.find(station(2), 10), Some(2), "it is at another port");
        fdb.forget(station(2), 2);
        assert_eq!(fdb.find(station(2), 10), None);
        fdb.forget(station(2), 2);
        fdb.learn(station(2), 5, 10);
        assert_eq!(fdb.find(station(2), 10), Some(5), "at once");
        fdb.forget(station(1), 1);
        assert_eq!(fdb.find(station(1), 10), Some(1), "for good");
    }

    #[test]
    fn workers_may_learn_at_the_same_time() {
        let fdb = Fdb::new(300);
        std::thread::scope(|scope| {
            for worker in 0..2u16 {
                let fdb = &fdb;
                scope.spawn(move || {
                    for round in 0..50_000u32 {
                        // All in a few lines.
                        let number = round % 64;
                        fdb.learn(
                            station(number),
                            u16::try_from(number * 2).unwrap() + worker,
                            round / 100,
                        );
                        if let Some(port) = fdb.find(station(number), round / 100) {
                            assert_eq!(u32::from(port) / 2, number, "another station's port");
                        }
                    }
                });
            }
        });
    }
}
