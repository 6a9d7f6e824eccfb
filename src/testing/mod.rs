//! What tests and benches need and the daemon does not: present in tests and with the feature
//! `testing` only, so that nothing here is in a release.
#![forbid(unsafe_code)]

pub mod probe;
