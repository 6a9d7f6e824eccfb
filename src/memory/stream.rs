//! Stores past the caches.
//!
//! A store to a line that is in no cache fetches it first, to overwrite it; a line that is stored
//! as a whole and past the caches is not fetched, and takes no other's place. Such stores are
//! weakly ordered: other CPUs may see later ordinary ones first, unless [`settle`] comes between.

/// Moves a line.
///
/// # Safety
/// As many bytes must be readable at `from` and writable at `to`, which is aligned to a line, and
/// neither range may begin within the other.
#[inline(always)]
pub(super) unsafe fn line(from: *const u8, to: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for both lines. Spelled out, so that for the language these are
    // stores like any others, as they are for this CPU's own loads.
    unsafe {
        core::arch::asm!(
            "movdqu {0}, [{from}]",
            "movdqu {1}, [{from} + 16]",
            "movdqu {2}, [{from} + 32]",
            "movdqu {3}, [{from} + 48]",
            "movntdq [{to}], {0}",
            "movntdq [{to} + 16], {1}",
            "movntdq [{to} + 32], {2}",
            "movntdq [{to} + 48], {3}",
            out(xmm_reg) _,
            out(xmm_reg) _,
            out(xmm_reg) _,
            out(xmm_reg) _,
            from = in(reg) from,
            to = in(reg) to,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for both lines.
    unsafe {
        core::ptr::copy(from, to, super::copy::LINE);
    }
}

/// Lets others see what was stored past the caches before all that is stored from now on.
#[inline]
pub(super) fn settle() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence touches no memory. It is spelled out for the reason given above.
    unsafe {
        core::arch::asm!("sfence", options(nostack, preserves_flags));
    }
}
