//! Hints to the CPU's caches. None has an architectural effect, whatever the address.

/// Asks for the line at `at`, to read it.
#[inline(always)]
pub(super) fn for_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address has no architectural effect.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the line at `at`, to read it some time later: it comes as far as the second cache,
/// which can wait for more lines at once than the first.
#[inline(always)]
pub(super) fn for_later(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the line at `at`, to write it: it comes without a copy left elsewhere, so that the
/// store need not ask a second time.
#[inline(always)]
pub(super) fn for_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above. The instruction is spelled out because the compiler makes a prefetch for
    // reading of the intrinsic where it does not know the CPU; every 64-bit x86 CPU takes this one,
    // if only as a no-op.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
