//! System calls behind safe types: one of the two places of this crate where unsafe code stands.
//!
//! Each module wraps one subject of the kernel and hands out values that can't be misused; nothing
//! here knows virtio. Guest memory is not touched here, that is `memory`.

#[expect(
    unsafe_code,
    reason = "thread affinity is a system call that takes a pointer"
)]
pub mod cpu;
