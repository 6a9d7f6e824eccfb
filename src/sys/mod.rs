//! System calls behind safe types: one of the two places of this crate where unsafe code stands.
//!
//! Each module wraps one subject of the kernel and hands out values that can't be misused; nothing
//! here knows virtio. Guest memory is not touched here, that is `memory`.

#[expect(unsafe_code, reason = "tap devices are made by ioctls that take pointers")]
pub mod tap;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "constants and sizes of the socket interface")]
#[expect(unsafe_code, reason = "network namespaces and packet sockets for tests")]
pub mod testnet;
