//! Limits of disks: those of each disk, those of the group that it is in, and what of both one
//! request queue uses in one turn of its worker.
//!
//! A queue looks at the limits once per turn and counts what it takes on its own; what it took is
//! charged when the turn is over. So there is no atomic read-modify-write per request, and what two
//! workers take too much in the same moment, they wait for afterwards.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;
use std::time::Duration;

use super::turns::Turns;
use super::{Allowance, BURST_DEFAULT, Limit, Rates, TICKS_PER_NANO, elapsed, now, ticks};

/// What a pause saves up for a disk unless something else is chosen.
pub const BURST_DISK: Duration = BURST_DEFAULT.saturating_mul(10);

/// How long a credit is left to the one whose turn it is. Longer than a worker takes to wake up on
/// a busy machine.
const GRACE: Duration = Duration::from_millis(50);
/// How often somebody who yields looks whether it is his turn now.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// What a request is to a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
}

impl Direction {
    /// Both.
    pub const ALL: [Direction; 2] = [Direction::Read, Direction::Write];
}

/// Place of the limit of both directions together, after those of [`Direction`].
const TOTAL: usize = 2;

/// What is chosen about the limits of a disk, or of a group: requests and bytes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRates {
    /// Reads.
    pub read: Rates,
    /// Writes.
    pub write: Rates,
    /// Both together.
    pub total: Rates,
}

impl Default for DiskRates {
    fn default() -> DiskRates {
        let none = Rates {
            burst: BURST_DISK,
            ..Rates::default()
        };
        DiskRates {
            read: none,
            write: none,
            total: none,
        }
    }
}

/// The limits of a disk or of a group, and whose turn it is among those that share them.
#[derive(Debug)]
pub struct LimitSet {
    is_on: AtomicBool,
    limits: [Limit; 3],
    turns: Turns,
}

impl LimitSet {
    /// No limits yet, for so many that share them.
    pub fn new(members: usize) -> LimitSet {
        LimitSet {
            is_on: AtomicBool::new(false),
            limits: Default::default(),
            turns: Turns::new(members),
        }
    }

    /// Chooses other rates, from now on.
    pub fn set(&self, rates: DiskRates) {
        self.set_at(now(), rates);
    }

    /// On a clock of a test.
    #[cfg(test)]
    pub(crate) fn set_on(&self, clock: fn() -> Duration, rates: DiskRates) {
        self.set_at(ticks(clock()), rates);
    }

    fn set_at(&self, now: u64, rates: DiskRates) {
        for (limit, rates) in self
            .limits
            .iter()
            .zip([rates.read, rates.write, rates.total])
        {
            limit.set_at(now, rates);
        }
        let is_on = self.limits.iter().any(Limit::is_on);
        self.is_on.store(is_on, Relaxed);
    }

    #[inline]
    fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    /// What may pass at `now` for `member`.
    fn share(&self, now: u64, grace: u64) -> Share {
        let allowances = self.limits.each_ref().map(|limit| {
            if limit.is_on() {
                limit.allowance_at(now, grace)
            } else {
                Allowance::FREE
            }
        });
        Share {
            allowances,
            taken: [(0, 0); 2],
        }
    }
}

/// What one queue may take of a set in one turn, and has taken.
#[derive(Debug, Clone, Copy)]
struct Share {
    allowances: [Allowance; 3],
    /// Requests and bytes, by direction.
    taken: [(u64, u64); 2],
}

impl Share {
    const FREE: Share = Share {
        allowances: [Allowance::FREE; 3],
        taken: [(0, 0); 2],
    };

    fn is_left(&self, direction: Direction) -> bool {
        self.allowances[direction as usize].is_left() && self.allowances[TOTAL].is_left()
    }

    /// There must be something left, or the request goes whatever is left.
    fn take(&mut self, direction: Direction, bytes: u64) {
        self.allowances[direction as usize].take(bytes);
        self.allowances[TOTAL].take(bytes);
        let (count, size) = &mut self.taken[direction as usize];
        (*count, *size) = (*count + 1, *size + bytes);
    }

    /// Ticks until something may pass.
    fn owed(&self, direction: Direction) -> u64 {
        let one = self.allowances[direction as usize].owed();
        one.max(self.allowances[TOTAL].owed())
    }

    /// Charges `set` with what was taken. Whether anything was.
    fn settle(&mut self, set: &LimitSet, now: u64) -> bool {
        let [read, write] = core::mem::take(&mut self.taken);
        let total = (read.0 + write.0, read.1 + write.1);
        for (limit, (count, bytes)) in set.limits.iter().zip([read, write, total]) {
            if count > 0 && limit.is_on() {
                limit.charge_at(now, count, bytes);
            }
        }
        total.0 > 0
    }
}

/// The limits that hold for a disk. Changed at any time.
#[derive(Debug)]
pub struct DiskLimits {
    own: LimitSet,
    groups: Arc<[LimitSet]>,
    /// Which of the groups it is in; [`NO_GROUP`] for none.
    group: AtomicUsize,
    /// Its number among all disks.
    number: usize,
    clock: fn() -> Duration,
}

const NO_GROUP: usize = usize::MAX;
/// Queues of a disk at most.
const QUEUES_MAX: usize = 128;

impl Default for DiskLimits {
    fn default() -> DiskLimits {
        DiskLimits::new(0, Arc::new([]))
    }
}

impl DiskLimits {
    /// No limits yet for the disk `number`, which may join one of `groups`.
    pub fn new(number: usize, groups: Arc<[LimitSet]>) -> DiskLimits {
        DiskLimits {
            own: LimitSet::new(QUEUES_MAX),
            groups,
            group: AtomicUsize::new(NO_GROUP),
            number,
            clock: elapsed,
        }
    }

    /// On a clock of a test.
    #[cfg(test)]
    pub(crate) fn with_clock(self, clock: fn() -> Duration) -> DiskLimits {
        DiskLimits { clock, ..self }
    }

    /// Chooses other rates, from now on.
    pub fn set(&self, rates: DiskRates) {
        self.own.set_at(ticks((self.clock)()), rates);
    }

    /// Joins the group of that number, or leaves the one that it is in.
    pub fn join(&self, group: Option<usize>) {
        self.group.store(group.unwrap_or(NO_GROUP), Relaxed);
    }

    #[inline]
    fn group(&self) -> Option<&LimitSet> {
        self.groups.get(self.group.load(Relaxed))
    }

    /// Whether there is any limit.
    #[inline]
    fn is_on(&self) -> bool {
        self.own.is_on() || self.group().is_some_and(LimitSet::is_on)
    }
}

/// What one request queue sees of the limits of its disk.
#[derive(Debug)]
pub struct QueueLimits {
    disk: Arc<DiskLimits>,
    /// Number of the queue.
    queue: usize,
    /// When this turn began, in ticks.
    now: u64,
    own: Share,
    group: Share,
    /// The group of this turn, and of turns before it.
    joined: usize,
}

impl QueueLimits {
    /// The view of the queue `queue`.
    pub fn new(disk: Arc<DiskLimits>, queue: u16) -> QueueLimits {
        QueueLimits {
            disk,
            queue: usize::from(queue) % QUEUES_MAX,
            now: 0,
            own: Share::FREE,
            group: Share::FREE,
            joined: NO_GROUP,
        }
    }

    /// Whether there is any limit.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.disk.is_on()
    }

    /// Nanoseconds on the clock of the limits, when this turn began.
    pub fn nanos(&self) -> u64 {
        self.now / TICKS_PER_NANO
    }

    /// A turn begins: looks at the clock and at the limits.
    #[cold]
    pub fn begin(&mut self) {
        self.now = ticks((self.disk.clock)());
        let joined = self.disk.group.load(Relaxed);
        if joined != self.joined {
            if let Some(left) = self.disk.groups.get(self.joined) {
                left.turns.mark(self.disk.number, false);
            }
            self.joined = joined;
        }
        let [own, group] = self.graces();
        self.own = self.disk.own.share(self.now, own);
        self.group = match self.joined_group() {
            Some(set) => set.share(self.now, group),
            None => Share::FREE,
        };
    }

    fn joined_group(&self) -> Option<&LimitSet> {
        self.disk.groups.get(self.joined)
    }

    /// How much of the latest credit of the disk and of the group is left to others.
    fn graces(&self) -> [u64; 2] {
        let yields = self.disk.own.turns.must_yield(self.queue);
        let group = self.joined_group();
        let group = group.is_some_and(|set| set.turns.must_yield(self.disk.number));
        [yields, yields || group].map(|yields| if yields { ticks(GRACE) } else { 0 })
    }

    /// Whether a request in this direction may pass.
    pub fn is_left(&self, direction: Direction) -> bool {
        self.own.is_left(direction) && self.group.is_left(direction)
    }

    /// Counts a request that passes. It may be larger than what is left: it is paid for later.
    pub fn take(&mut self, direction: Direction, bytes: u64) {
        self.own.take(direction, bytes);
        self.group.take(direction, bytes);
    }

    /// The turn is over: charges what was taken, and tells others which directions this queue still
    /// has requests waiting in.
    pub fn settle(&mut self, waits: [bool; 2]) {
        let group = self.disk.groups.get(self.joined);
        let (own, number) = (&self.disk.own, self.disk.number);
        if self.own.settle(own, self.now) {
            own.turns.pass_on(self.queue);
        }
        own.turns.mark(self.queue, waits != [false; 2]);
        if let Some(set) = group {
            if self.group.settle(set, self.now) {
                set.turns.pass_on(number);
            }
            let mut both = Direction::ALL.into_iter().zip(waits);
            // Not by the disk's own limits: who waits for those does not wait for a turn.
            let held_up = both.any(|(direction, waits)| {
                waits && self.own.is_left(direction) && !self.group.is_left(direction)
            });
            if held_up || !own.turns.others_wait(self.queue) {
                set.turns.mark(number, held_up);
            }
        }
    }

    /// How long until a request in one of these directions may pass; zero when one may now.
    pub fn wait(&self, directions: [bool; 2]) -> Option<Duration> {
        let now = ticks((self.disk.clock)());
        let graces = self.graces();
        let sets = [Some(&self.disk.own), self.joined_group()];
        let owed = |direction: Direction| {
            let sets = sets.into_iter().flatten().zip(graces);
            let of = |(set, grace): (&LimitSet, u64)| match set.share(now, 0).owed(direction) {
                // What is there is left to another, who may be late to take it.
                0 => set.share(now, grace).owed(direction).min(ticks(LOOK_AGAIN)),
                owed => owed,
            };
            sets.map(of).max().unwrap_or(0)
        };
        let both = Direction::ALL.into_iter().zip(directions);
        let least = both
            .filter(|(_, wanted)| *wanted)
            .map(|(direction, _)| owed(direction));
        Some(Duration::from_nanos(least.min()? / TICKS_PER_NANO))
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;

    thread_local! {
        static NOW: Cell<Duration> = const { Cell::new(Duration::from_secs(1)) };
    }

    /// How many requests each queue gets through in ten seconds, if all always want to and are
    /// asked in the same order every `step`.
    fn passed(queues: &mut [QueueLimits], step: Duration) -> Vec<u64> {
        let mut counts = vec![0; queues.len()];
        let end = NOW.get() + Duration::from_secs(10);
        while NOW.get() < end {
            for (queue, count) in queues.iter_mut().zip(&mut counts) {
                queue.begin();
                while queue.is_left(Direction::Read) {
                    queue.take(Direction::Read, 512);
                    *count += 1;
                }
                queue.settle([true, false]);
            }
            NOW.set(NOW.get() + step);
        }
        counts
    }

    #[test]
    fn the_queues_of_a_disk_take_turns_however_often_they_look() {
        let disk = Arc::new(DiskLimits::default().with_clock(|| NOW.get()));
        let mut total = DiskRates::default().total;
        total.count = Some(3000);
        disk.set(DiskRates {
            total,
            ..DiskRates::default()
        });
        let mut queues: Vec<_> = [0, 1, 100]
            .map(|queue| QueueLimits::new(Arc::clone(&disk), queue))
            .into();
        for micros in [10, 333, 1000, 5000] {
            let counts = passed(&mut queues, Duration::from_micros(micros));
            let all: u64 = counts.iter().sum();
            assert!(all.abs_diff(30_000) <= 310, "{counts:?}");
            for count in &counts {
                assert!(
                    count.abs_diff(10_000) <= 300,
                    "every {micros} µs: {counts:?}"
                );
            }
        }
    }

    #[test]
    fn who_waits_knows_for_how_long_and_looks_for_his_turn() {
        let disk = Arc::new(DiskLimits::default().with_clock(|| NOW.get()));
        let mut read = DiskRates::default().read;
        read.count = Some(10);
        disk.set(DiskRates {
            read,
            ..DiskRates::default()
        });
        let [mut one, mut two] = [0, 1].map(|queue| QueueLimits::new(Arc::clone(&disk), queue));
        for queue in [&mut one, &mut two] {
            queue.begin();
            if queue.is_left(Direction::Read) {
                queue.take(Direction::Read, 512);
            }
            queue.settle([true, false]);
        }
        for queue in [&one, &two] {
            assert_eq!(queue.wait([true, false]), Some(Duration::from_millis(100)));
            assert_eq!(queue.wait([true, true]), Some(Duration::ZERO));
            assert_eq!(queue.wait([false, false]), None);
        }
        NOW.set(NOW.get() + Duration::from_millis(100));
        let waits = [&one, &two].map(|queue| queue.wait([true, false]));
        assert_eq!(waits, [Some(Duration::ZERO), Some(LOOK_AGAIN)]);
    }
}
