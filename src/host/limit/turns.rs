//! `Turns`: who among those that wait for one limit comes next.
//!
//! Without it, whoever looks first after a limit opens would take all that it gives, and that is
//! always the same one. There is no lock: members note that they wait, and a number says whose turn
//! it is. Both are hints; when they are wrong, somebody waits a little longer than he must, or
//! somebody goes first who would not have to. How much passes is never decided here.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Whose turn it is, among a fixed number of members.
#[derive(Debug)]
pub(super) struct Turns {
    /// The next one, or somebody before him.
    next: AtomicUsize,
    /// A bit for each member that waits.
    waiting: Box<[AtomicU64]>,
}

impl Turns {
    /// For so many members, at least one.
    pub(super) fn new(members: usize) -> Turns {
        let words = members.div_ceil(64).max(1);
        Turns {
            next: AtomicUsize::new(0),
            waiting: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn place(&self, member: usize) -> (&AtomicU64, u64) {
        (&self.waiting[member / 64], 1 << (member % 64))
    }

    /// Notes whether `member` waits. Written only when that changes.
    pub(super) fn mark(&self, member: usize, waits: bool) {
        let (word, bit) = self.place(member);
        match (waits, word.load(Relaxed) & bit != 0) {
            (true, false) => _ = word.fetch_or(bit, Relaxed),
            (false, true) => _ = word.fetch_and(!bit, Relaxed),
            _ => {}
        }
    }

    /// Whether anybody but `member` waits.
    pub(super) fn others_wait(&self, member: usize) -> bool {
        self.waiting.iter().enumerate().any(|(at, word)| {
            let own = if at == member / 64 {
                1 << (member % 64)
            } else {
                0
            };
            word.load(Relaxed) & !own != 0
        })
    }

    /// The first that waits, from `from` on and around.
    fn first_waiting(&self, from: usize) -> Option<usize> {
        let words = self.waiting.len();
        let (start, bit) = ((from / 64) % words, from % 64);
        // The word that it begins in comes twice: its end first, its beginning last.
        (0..=words).find_map(|step| {
            let at = (start + step) % words;
            let mask = match step {
                0 => u64::MAX << bit,
                step if step == words => !(u64::MAX << bit),
                _ => u64::MAX,
            };
            let bits = self.waiting[at].load(Relaxed) & mask;
            (bits != 0).then(|| at * 64 + bits.trailing_zeros() as usize)
        })
    }

    /// Whether `member` has to let others go first.
    pub(super) fn must_yield(&self, member: usize) -> bool {
        self.others_wait(member) && self.first_waiting(self.next.load(Relaxed)) != Some(member)
    }

    /// `member` took something: the turn goes on to the next that waits. Who took it out of turn
    /// did so because the one whose turn it was did not, who is then left out once.
    pub(super) fn pass_on(&self, member: usize) {
        if self.others_wait(member)
            && let Some(holder) = self.first_waiting(self.next.load(Relaxed))
        {
            // Not to himself, if the others come after him.
            let next = self.first_waiting(holder + 1);
            let from = if next == Some(member) { member } else { holder };
            self.next.store(from + 1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_turn_goes_around_among_those_that_wait() {
        let turns = Turns::new(130);
        for member in [3, 64, 129] {
            turns.mark(member, true);
        }
        let mut order = Vec::new();
        for _ in 0..7 {
            let own: Vec<_> = (0..130).filter(|&m| !turns.must_yield(m)).collect();
            let [member] = own[..] else {
                panic!("the turn of {own:?}")
            };
            order.push(member);
            turns.pass_on(member);
        }
        assert_eq!(order, [3, 64, 129, 3, 64, 129, 3]);
    }

    #[test]
    fn alone_nobody_yields_and_a_newcomer_lets_others_go_first() {
        let turns = Turns::new(2);
        assert!(!turns.must_yield(0) && !turns.must_yield(1));
        turns.mark(1, true);
        turns.mark(1, true);
        assert!(turns.must_yield(0) && !turns.must_yield(1));
        turns.pass_on(1);
        turns.mark(1, false);
        assert!(!turns.must_yield(0));
        assert_eq!(turns.waiting[0].load(Relaxed), 0);
    }

    #[test]
    fn who_leaves_his_turn_unused_is_left_out_once() {
        let turns = Turns::new(3);
        for member in 0..3 {
            turns.mark(member, true);
        }
        assert!(!turns.must_yield(0));
        turns.pass_on(2);
        assert!(!turns.must_yield(1));
        // His own turn would be next: it goes on to the one after him.
        turns.pass_on(2);
        assert!(!turns.must_yield(0));
    }
}
