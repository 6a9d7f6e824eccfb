//! What the project promises, and the tests and benches that hold it to that. docs/conformance.md
//! shows this as a table; names that are not there fail the test (`evidence`).
//!
//! What holds a promise is `FILE: NAME NAME…` for tests, modules of tests that a macro makes, or
//! functions of a bench, a bench alone, or a script with the words that it is given.

mod disks;
mod network;
mod rings;

/// A promise, and what holds the project to it.
pub type Promise = (&'static str, &'static [&'static str]);

/// The promises by their subject.
pub const ALL: &[(&str, &[Promise])] = &[
    ("Rings: what is understood", rings::UNDERSTOOD),
    ("Rings: who tells whom", rings::TOLD),
    ("Rings: models and other implementations", rings::COMPARED),
    ("Rings: drivers that break the rules", rings::BROKEN),
    ("Rings: what it costs", rings::COSTS),
    ("Network", network::ALL),
    ("Disks", disks::ALL),
];
