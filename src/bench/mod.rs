//! `vringd bench`: a vhost-user front-end that loads any back-end, and reports how fast and how
//! soon it answers.
//!
//! No guest. `config` says what to do, [`net`] sends frames. Both stand on `memory` that is shared,
//! `client`, which talks vhost-user, `ring`, the driver side of both ring formats, `histogram` of
//! latencies, and `watch` for what is looked at meanwhile. Rings are polled; a back-end is kicked
//! only when it asks for it. Nothing waits without a deadline.
#![forbid(unsafe_code)]

mod client;
mod histogram;
mod memory;
pub mod net;
mod ring;
mod watch;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::memory::MemoryError;
use crate::sys::cpu::CpuError;

pub use histogram::Histogram;

/// Why a measurement came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Nobody listens.
    #[error("--socket {path:?}: can't connect")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The back-end went away, or did not answer, during a message.
    #[error("back-end: {request}: {}", answer(source))]
    Talk {
        /// The message.
        request: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is not one to this message.
    #[error("back-end: {request}: malformed answer")]
    Nonsense {
        /// The message.
        request: &'static str,
    },
    /// The back-end says no.
    #[error("back-end: {request}: refused")]
    Refused {
        /// The message.
        request: &'static str,
    },
    /// A feature is asked for that the back-end does not have.
    #[error("{flag}: the back-end does not offer {name} (bit {bit})")]
    Feature {
        /// The flag that asks for it.
        flag: String,
        /// The feature's name in the specification.
        name: &'static str,
        /// Its number.
        bit: u32,
    },
    /// The back-end has fewer queues.
    #[error("--queues \"{queues}\": the back-end has {offered}")]
    Queues {
        /// Queue pairs asked for.
        queues: u16,
        /// What GET_QUEUE_NUM said.
        offered: u64,
    },
    /// The memory to be shared can't be had.
    #[error("{bytes} bytes of memory for rings and buffers")]
    NoMemory {
        /// How much.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The memory to be shared can't be mapped.
    #[error("memory for rings and buffers")]
    Memory(#[source] MemoryError),
    /// There is no eventfd.
    #[error("eventfd")]
    Eventfd(#[source] io::Error),
    /// The core can't be used.
    #[error("--core")]
    Core(#[source] CpuError),
    /// The CPU time of the back-end can't be read.
    #[error("--pid \"{pid}\": {path} can't be read")]
    CpuTime {
        /// The process.
        pid: u32,
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The connection is closed.
    #[error("the back-end went away after {received} frames")]
    Gone {
        /// Frames received until then.
        received: u64,
    },
    /// The back-end breaks the rules of a virtqueue.
    #[error("back-end: queue {queue}: {problem}")]
    Ring {
        /// The queue pair.
        queue: usize,
        /// What it did.
        problem: String,
    },
    /// One of several queue pairs is dead: the back-end offers more than it serves.
    #[error("queue pair {queue} of {queues} sends nothing back")]
    Unserved {
        /// The queue pair, from 0.
        queue: usize,
        /// Queue pairs asked for.
        queues: u16,
    },
    /// Frames are in flight and none comes back.
    #[error(
        "the back-end sends nothing back: {missing} frames in flight, {received} received, none \
         for {} ms", .silence.as_millis()
    )]
    Silent {
        /// Frames on the way.
        missing: u64,
        /// Frames received before.
        received: u64,
        /// How long there was none.
        silence: Duration,
    },
}

impl BenchError {
    fn talk(request: &'static str, source: io::Error) -> BenchError {
        BenchError::Talk { request, source }
    }
}

/// What an error of the socket means.
fn answer(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer in time",
        _ => "the connection is closed",
    }
}
