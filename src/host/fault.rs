//! `FaultDisk`: another disk that fails, dawdles and lies as it is told to. For tests, of guests
//! and of ourselves: what a sick disk does is hard to get from a healthy one.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::memory::Segment;

use super::blk::{BlkIo, BlkOp, Completion, Full, Token};

/// How long completions wait at most for others to change places with.
const REORDER_WITHIN: Duration = Duration::from_millis(1);

// The same on every Linux.
const EINTR: i32 = 4;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const ENOSPC: i32 = 28;

/// What goes wrong. "Every Nth" counts the operations of a queue while it has faults; 0 is never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// Every Nth operation fails with EIO.
    pub eio: u32,
    /// Every Nth operation, if it writes, fails with ENOSPC.
    pub enospc: u32,
    /// Every Nth operation ends with EINTR.
    pub eintr: u32,
    /// Every Nth operation ends with EAGAIN.
    pub eagain: u32,
    /// Every Nth operation moves half of its bytes.
    pub short: u32,
    /// Completions come so much later.
    pub delay: Duration,
    /// So many completions are told together, the last first.
    pub reorder: u32,
    /// Flushes do nothing, and durable writes are not.
    pub drop_flush: bool,
}

/// What goes wrong with a disk now. Whoever controls the disk sets it; its queues look once per
/// turn. One that looks while it is being set may have some of both plans for that turn.
#[derive(Debug, Default)]
pub struct Faults {
    is_on: AtomicBool,
    /// In the order of the plan; the delay in microseconds.
    numbers: [AtomicU32; 7],
    drop_flush: AtomicBool,
}

impl Faults {
    /// From now on this goes wrong, or nothing.
    pub fn set(&self, plan: Option<FaultPlan>) {
        let wanted = plan.unwrap_or_default();
        let delay = u32::try_from(wanted.delay.as_micros()).unwrap_or(u32::MAX);
        let numbers = [
            wanted.eio,
            wanted.enospc,
            wanted.eintr,
            wanted.eagain,
            wanted.short,
            wanted.reorder,
            delay,
        ];
        for (place, number) in self.numbers.iter().zip(numbers) {
            place.store(number, Relaxed);
        }
        self.drop_flush.store(wanted.drop_flush, Relaxed);
        self.is_on.store(plan.is_some(), Relaxed);
    }

    #[inline]
    fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    fn plan(&self) -> FaultPlan {
        let [eio, enospc, eintr, eagain, short, reorder, delay] =
            self.numbers.each_ref().map(|number| number.load(Relaxed));
        FaultPlan {
            eio,
            enospc,
            eintr,
            eagain,
            short,
            delay: Duration::from_micros(delay.into()),
            reorder,
            drop_flush: self.drop_flush.load(Relaxed),
        }
    }
}

/// The faults of one queue, and the completions that they hold back.
#[derive(Debug)]
pub struct FaultDisk {
    faults: Arc<Faults>,
    /// In this turn.
    plan: FaultPlan,
    /// What short operations keep to.
    block_size: u32,
    operations: u64,
    injected: u64,
    segments: Vec<Segment>,
    /// With the time since when.
    held: VecDeque<(Instant, Completion)>,
    ready: VecDeque<Completion>,
}

impl FaultDisk {
    /// The faults of a queue of a disk of blocks of `block_size` bytes.
    pub fn new(faults: Arc<Faults>, block_size: u32) -> FaultDisk {
        FaultDisk {
            faults,
            plan: FaultPlan::default(),
            block_size,
            operations: 0,
            injected: 0,
            segments: Vec::new(),
            held: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// Operations so far that did not go as they should.
    pub fn injected(&self) -> u64 {
        self.injected
    }

    /// Whether something goes wrong, or still has to come right again.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.faults.is_on() || self.holds()
    }

    /// Whether completions are held back: nothing but time wakes those.
    pub fn holds(&self) -> bool {
        !self.held.is_empty() || !self.ready.is_empty()
    }

    /// The faults over `disk`, for one turn.
    pub fn over<'a>(&'a mut self, disk: &'a mut dyn BlkIo) -> Faulty<'a> {
        self.plan = self.faults.plan();
        Faulty { faults: self, disk }
    }

    /// How the operation that is counted now fails.
    fn error(&self, op: &BlkOp<'_>) -> Option<i32> {
        let writes = matches!(op, BlkOp::Write { .. } | BlkOp::WriteZeroes { .. });
        let plan = &self.plan;
        let kinds = [
            (plan.eio, EIO),
            (if writes { plan.enospc } else { 0 }, ENOSPC),
            (plan.eintr, EINTR),
            (plan.eagain, EAGAIN),
        ];
        let hit = kinds.into_iter().find(|(every, _)| self.hits(*every));
        hit.map(|(_, errno)| errno)
    }

    fn hits(&self, every: u32) -> bool {
        every > 0 && self.operations.is_multiple_of(every.into())
    }

    fn hold(&mut self, completion: Completion) {
        self.held.push_back((Instant::now(), completion));
    }

    /// Half of `bytes`, in whole blocks; all of it where half is none.
    fn half(&self, bytes: u64) -> u64 {
        let block = u64::from(self.block_size);
        match bytes / 2 / block * block {
            0 => bytes,
            half => half,
        }
    }

    /// Puts the first half of `segments` into the list.
    fn halve(&mut self, segments: &[Segment]) {
        let bytes: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let mut left = usize::try_from(self.half(bytes)).unwrap_or(usize::MAX);
        self.segments.clear();
        for segment in segments {
            let here = segment.take(left);
            left -= here.len();
            if !here.is_empty() {
                self.segments.push(here);
            }
        }
    }

    /// Lets go of what has waited long enough.
    fn let_go(&mut self) {
        let Some((oldest, _)) = self.held.front() else {
            return;
        };
        let now = Instant::now();
        let delay = self.plan.delay;
        let waited = |since: &Instant| now.saturating_duration_since(*since);
        if self.plan.reorder == 0 {
            let is_due = |held: &&(Instant, Completion)| waited(&held.0) >= delay;
            let count = self.held.iter().take_while(is_due).count();
            let due = self.held.drain(..count);
            self.ready.extend(due.map(|(_, completion)| completion));
        } else {
            let waited = waited(oldest);
            let many = self.held.len() >= self.plan.reorder as usize && waited >= delay;
            if many || waited >= delay + REORDER_WITHIN {
                let last_first = self.held.drain(..).rev();
                self.ready
                    .extend(last_first.map(|(_, completion)| completion));
            }
        }
    }
}

/// Faults and the disk under them, together for one turn.
pub struct Faulty<'a> {
    faults: &'a mut FaultDisk,
    disk: &'a mut dyn BlkIo,
}

impl core::fmt::Debug for Faulty<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.faults.fmt(f)
    }
}

impl BlkIo for Faulty<'_> {
    fn submit(&mut self, token: Token, op: BlkOp<'_>) -> Result<(), Full> {
        let faults = &mut *self.faults;
        faults.operations += 1;
        if let Some(errno) = faults.error(&op) {
            faults.injected += 1;
            let result = Err(errno);
            faults.hold(Completion { token, result });
            return Ok(());
        }
        let dropped = faults.plan.drop_flush;
        if dropped && matches!(op, BlkOp::Flush) {
            faults.injected += 1;
            let result = Ok(0);
            faults.hold(Completion { token, result });
            return Ok(());
        }
        let short = faults.hits(faults.plan.short);
        faults.injected += u64::from(short);
        match op {
            BlkOp::Read { offset, segments } if short => {
                faults.halve(segments);
                let segments = &faults.segments[..];
                self.disk.submit(token, BlkOp::Read { offset, segments })
            }
            BlkOp::Write {
                offset,
                segments,
                durable,
            } if short || dropped => {
                faults.segments.clear();
                if short {
                    faults.halve(segments);
                } else {
                    faults.segments.extend_from_slice(segments);
                }
                let op = BlkOp::Write {
                    offset,
                    segments: &faults.segments,
                    durable: durable && !dropped,
                };
                self.disk.submit(token, op)
            }
            op => self.disk.submit(token, op),
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        while let Some(completion) = self.disk.reap() {
            self.faults.hold(completion);
        }
        if self.faults.ready.is_empty() {
            self.faults.let_go();
        }
        self.faults.ready.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.disk.in_flight() + self.faults.held.len() + self.faults.ready.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::null::NullDisk;

    fn token(slot: u16) -> Token {
        let generation = 0;
        Token { slot, generation }
    }

    /// Results of `count` operations in the order of their completion.
    fn run(plan: FaultPlan, count: u16, op: BlkOp<'_>) -> Vec<(u16, Result<u32, i32>)> {
        let shared = Arc::new(Faults::default());
        shared.set(Some(plan));
        let (mut faults, mut disk) = (FaultDisk::new(shared, 512), NullDisk::new(64));
        let mut faulty = faults.over(&mut disk);
        for slot in 0..count {
            faulty.submit(token(slot), op).unwrap();
        }
        let mut done = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while done.len() < usize::from(count) {
            assert!(Instant::now() < deadline, "completions are missing");
            assert_eq!(faulty.in_flight(), usize::from(count) - done.len());
            done.extend(faulty.reap().map(|c| (c.token.slot, c.result)));
        }
        assert!(!faults.holds());
        done
    }

    #[test]
    fn every_nth_operation_fails() {
        let plan = FaultPlan {
            eio: 3,
            enospc: 2,
            ..FaultPlan::default()
        };
        let zeroes = BlkOp::WriteZeroes {
            offset: 0,
            bytes: 512,
            unmap: false,
        };
        let results = |count, op| {
            let mut done = run(plan, count, op);
            done.sort_by_key(|done| done.0);
            done.into_iter().map(|done| done.1).collect::<Vec<_>>()
        };
        let want = [Ok(512), Err(ENOSPC), Err(EIO), Err(ENOSPC), Ok(512)];
        assert_eq!(results(5, zeroes), want);
        assert_eq!(results(3, BlkOp::Flush), [Ok(0), Ok(0), Err(EIO)]);
    }

    #[test]
    fn completions_change_places_and_none_is_kept() {
        let plan = FaultPlan {
            reorder: 3,
            ..FaultPlan::default()
        };
        let order = |count| -> Vec<u16> {
            let done = run(plan, count, BlkOp::Flush);
            done.into_iter().map(|done| done.0).collect()
        };
        assert_eq!(order(3), [2, 1, 0]);
        assert_eq!(order(2), [1, 0], "too few, but not for ever");
    }

    #[test]
    fn late_completions_come_late() {
        let plan = FaultPlan {
            delay: Duration::from_millis(20),
            ..FaultPlan::default()
        };
        let begin = Instant::now();
        assert_eq!(run(plan, 2, BlkOp::Flush).len(), 2);
        assert!(begin.elapsed() >= plan.delay);
    }

    #[test]
    fn what_was_held_back_follows_the_plan_of_now() {
        let shared = Arc::new(Faults::default());
        let mut faults = FaultDisk::new(Arc::clone(&shared), 512);
        let mut disk = NullDisk::new(64);
        assert!(!faults.is_active());
        let plan = FaultPlan {
            delay: Duration::from_secs(3600),
            drop_flush: true,
            ..FaultPlan::default()
        };
        shared.set(Some(plan));
        assert_eq!(shared.plan(), plan);
        let mut faulty = faults.over(&mut disk);
        faulty.submit(token(1), BlkOp::Flush).unwrap();
        assert_eq!(faulty.reap(), None);
        shared.set(None);
        assert!(faults.is_active(), "one is still to come");
        let done = faults.over(&mut disk).reap().unwrap();
        assert_eq!((done.token, done.result), (token(1), Ok(0)));
        assert!(!faults.is_active());
        assert_eq!(shared.plan(), FaultPlan::default());
    }

    #[test]
    fn half_is_whole_blocks_and_never_nothing() {
        let faults = FaultDisk::new(Arc::default(), 4096);
        for (bytes, half) in [(4096, 4096), (8192, 4096), (20480, 8192), (0, 0)] {
            assert_eq!(faults.half(bytes), half);
        }
    }
}
