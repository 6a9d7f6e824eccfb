//! vringd: a vhost-user back-end.
pub mod config;
