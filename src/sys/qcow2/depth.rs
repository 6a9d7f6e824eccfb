//! How deep the library may go on a thread's stack.
//!
//! To find a free cluster it calls itself, once for each block of refcounts that isn't there, and
//! where the tables contradict each other it never comes to an end. A stack that overflows ends the
//! process, a panic only the image: so there is one before. The library asks for the alignment of
//! memory each time, which is where this is looked at.

use std::cell::Cell;

/// Bytes of stack that the library may use. It needs a tenth of that for images that are in order.
const MAX: usize = 512 << 10;

thread_local! {
    /// Where the stack was when the library was called, or 0.
    static BEGIN: Cell<usize> = const { Cell::new(0) };
}

/// Where the stack is.
#[inline(never)]
fn here() -> usize {
    let here = 0u8;
    std::hint::black_box(&raw const here).addr()
}

pub(super) fn begins_here() {
    BEGIN.set(here());
}

/// # Panics
/// Too deep.
pub(super) fn check() {
    let begin = BEGIN.get();
    assert!(
        begin == 0 || begin.abs_diff(here()) < MAX,
        "the image's tables send the library round in circles"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goes down as good as for ever.
    fn down(level: usize) -> usize {
        check();
        if level == usize::MAX {
            return 0;
        }
        let room = std::hint::black_box([level; 64]);
        down(level + 1) + room[level % 64]
    }

    #[test]
    fn whoever_goes_down_for_ever_panics_before_the_stack_ends() {
        let thread = std::thread::Builder::new().stack_size(2 * MAX);
        let thread = thread.spawn(|| {
            begins_here();
            check();
            down(0)
        });
        let panic = thread.unwrap().join().unwrap_err();
        let said = panic.downcast_ref::<&str>().unwrap();
        assert!(said.contains("in circles"), "{said}");
    }
}
