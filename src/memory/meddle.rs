//! For fuzzing: something happens between two of the device's reads of shared memory.

use core::cell::RefCell;

/// What happens; `false` once it is over.
type Meddler = Box<dyn FnMut() -> bool>;

std::thread_local! {
    static MEDDLERS: RefCell<Vec<Meddler>> = const { RefCell::new(Vec::new()) };
}

/// Lets `meddler` run before each read of this thread until it says that it is over.
pub fn between_reads(meddler: Meddler) {
    MEDDLERS.with_borrow_mut(|meddlers| meddlers.push(meddler));
}

/// Forgets all of them.
pub fn stop() {
    MEDDLERS.with_borrow_mut(Vec::clear);
}

/// A read of shared memory comes next.
pub(super) fn before_read() {
    MEDDLERS.with_borrow_mut(|meddlers| meddlers.retain_mut(|meddler| meddler()));
}
