//! Which threads must not wait for whoever reads what they say.

use std::cell::Cell;

thread_local! {
    static NEVER_WAITS: Cell<bool> = const { Cell::new(false) };
}

/// From now on this thread does not wait for whoever reads the log.
pub fn never_wait() {
    NEVER_WAITS.set(true);
}

/// Whether this thread has said so.
pub fn never_waits() -> bool {
    NEVER_WAITS.get()
}
