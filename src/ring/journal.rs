//! `Journal`: who keeps a record of what is in flight.
//!
//! The record must be right whenever the process is killed, so the calls come in a fixed order:
//! `took` before the device acts on a chain, `staged` when its used element is written, then
//! `commit_begin`, the ring's one publishing store, `commit_end`. [`NoJournal`] keeps nothing.

use super::ChainId;

/// A record of chains in flight that survives the process.
pub trait Journal: Send {
    /// The chain `id` was popped. Returns its entry, which comes back in `staged`.
    fn took(&mut self, id: &ChainId) -> u16;
    /// The chain of `entry` was given back unused.
    fn gave_back(&mut self, entry: u16);
    /// The used element of the chain of `entry` is written, but not visible yet.
    fn staged(&mut self, entry: u16);
    /// The staged elements are about to become visible.
    fn commit_begin(&mut self);
    /// They are visible.
    fn commit_end(&mut self);
}

/// Keeps no record.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoJournal;

impl Journal for NoJournal {
    #[inline]
    fn took(&mut self, _id: &ChainId) -> u16 {
        0
    }
    #[inline]
    fn gave_back(&mut self, _entry: u16) {}
    #[inline]
    fn staged(&mut self, _entry: u16) {}
    #[inline]
    fn commit_begin(&mut self) {}
    #[inline]
    fn commit_end(&mut self) {}
}
