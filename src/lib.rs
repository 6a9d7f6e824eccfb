//! vringd: a vhost-user back-end.
pub mod config;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
