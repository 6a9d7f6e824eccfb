//! For tests: which words of ring memory a thread stored to, in order, and which cache lines it
//! touched.

use core::cell::RefCell;
use std::collections::BTreeSet;

const LINE: usize = 64;

std::thread_local! {
    static STORES: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
    static LINES: RefCell<Option<BTreeSet<usize>>> = const { RefCell::new(None) };
}

/// What `work` does, and the addresses of all words that it stored through an [`Area`].
///
/// [`Area`]: super::Area
pub(crate) fn stores<T>(work: impl FnOnce() -> T) -> (T, Vec<usize>) {
    STORES.set(Some(Vec::new()));
    let done = work();
    (done, STORES.take().unwrap_or_default())
}

/// How many cache lines `work` read or wrote through an [`Area`], and how many of them it wrote.
///
/// [`Area`]: super::Area
pub(crate) fn lines(work: impl FnOnce()) -> (usize, usize) {
    LINES.set(Some(BTreeSet::new()));
    let ((), stored) = stores(work);
    let touched = LINES.take().unwrap_or_default();
    let written: BTreeSet<_> = stored.into_iter().map(|at| at / LINE).collect();
    (touched.len(), written.len())
}

/// An access to the word at `at`.
pub(super) fn touch(at: usize) {
    LINES.with_borrow_mut(|lines| {
        if let Some(lines) = lines {
            lines.insert(at / LINE);
        }
    });
}

/// A store to the word at `at`.
pub(super) fn note(at: usize) {
    STORES.with_borrow_mut(|stores| {
        if let Some(stores) = stores {
            stores.push(at);
        }
    });
}
