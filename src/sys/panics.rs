//! Panics: a mistake of ours ends the daemon, one of a library that runs on a thread of its own
//! ends what it was asked to do.
//!
//! The release build unwinds, so that such a thread can catch a panic. Everywhere else nobody does:
//! the hook ends the process before anything is unwound, as if the build aborted.

use std::any::Any;
use std::cell::Cell;
use std::io;

thread_local! {
    /// Whether somebody on this thread catches panics.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// This thread catches its panics.
pub fn caught_here() {
    CAUGHT.set(true);
}

/// Runs `what` on a thread `name`, and waits for it; an inner error if it panicked.
///
/// # Errors
/// When there is no thread to be had.
pub fn caught_on<T: Send>(
    name: String,
    what: impl FnOnce() -> T + Send,
) -> io::Result<Result<T, Box<dyn Any + Send>>> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name);
        let thread = thread.spawn_scoped(scope, || {
            caught_here();
            what()
        })?;
        Ok(thread.join())
    })
}

/// From now on a panic ends the process, unless its thread catches it.
pub fn abort_elsewhere() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if !CAUGHT.get() {
            std::process::abort();
        }
    }));
}
