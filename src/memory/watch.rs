//! For tests: which words of ring memory a thread stored to, in order.

use core::cell::RefCell;

std::thread_local! {
    static STORES: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
}

/// What `work` does, and the addresses of all words that it stored through an [`Area`].
///
/// [`Area`]: super::Area
pub(crate) fn stores<T>(work: impl FnOnce() -> T) -> (T, Vec<usize>) {
    STORES.set(Some(Vec::new()));
    let done = work();
    (done, STORES.take().unwrap_or_default())
}

/// A store to the word at `at`.
pub(super) fn note(at: usize) {
    STORES.with_borrow_mut(|stores| {
        if let Some(stores) = stores {
            stores.push(at);
        }
    });
}
