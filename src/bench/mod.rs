//! `vringd bench`: a vhost-user front-end that loads any back-end, and reports how fast and how
//! soon it answers.
//!
//! No guest. `config` says what to do, [`net`] sends frames, [`blk`] requests to a disk. Both stand
//! on `memory` that is shared, `client`, which talks vhost-user, `ring`, the driver side of both
//! ring formats, `histogram` of latencies, and `watch` for what is looked at meanwhile. Rings are
//! polled; a back-end is kicked only when it asks for it. Nothing waits without a deadline.
#![forbid(unsafe_code)]

pub mod blk;
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
    #[error("the back-end went away after {received} {what}")]
    Gone {
        /// Frames or requests that came back until then.
        received: u64,
        /// Which of them.
        what: &'static str,
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
        /// Queue pairs asked for, of all devices.
        queues: usize,
    },
    /// Frames are in flight and none comes back.
    #[error(
        "the back-end sends nothing back: {missing} {what} in flight, {received} received, none \
         for {} ms", .silence.as_millis()
    )]
    Silent {
        /// Frames or requests on the way.
        missing: u64,
        /// Those received before.
        received: u64,
        /// Which of them.
        what: &'static str,
        /// How long there was none.
        silence: Duration,
    },
    /// The cores can't be used.
    #[error("--cpus-allowed")]
    Cores(#[source] CpuError),
    /// The ring is too small for the depth.
    #[error("--iodepth \"{depth}\": a ring of {ring_size} has not enough descriptors")]
    Descriptors {
        /// Requests in flight asked for.
        depth: u16,
        /// Descriptors that there can be.
        ring_size: u32,
    },
    /// Depth, queues and size of the requests come to more memory than is sensible.
    #[error("{bytes} bytes of memory for rings and buffers: take fewer or smaller requests")]
    TooMuch {
        /// How much.
        bytes: u64,
    },
    /// The disk has larger blocks.
    #[error("--bs \"{asked}\": not a multiple of the disk's block size {disk}")]
    BlockSize {
        /// Bytes of a request asked for.
        asked: u32,
        /// The disk's.
        disk: u32,
    },
    /// The disk can't be written.
    #[error("--rw \"{rw}\": the disk is read-only")]
    ReadOnly {
        /// The load asked for.
        rw: &'static str,
    },
    /// One DISCARD takes less.
    #[error("--bs \"{asked}\": the back-end discards {sectors} sectors at most in one request")]
    Discard {
        /// Bytes of a request asked for.
        asked: u32,
        /// What config space says.
        sectors: u32,
    },
    /// The range is not on the disk.
    #[error("{size} bytes from offset {offset} on: the disk has {disk}")]
    Range {
        /// `--offset`.
        offset: u64,
        /// `--size`, or what is left of the disk.
        size: u64,
        /// Bytes of the disk.
        disk: u64,
    },
    /// A queue's part of the range is too small.
    #[error("the range has {blocks} blocks for a queue, the load needs {least} at least")]
    FewBlocks {
        /// Blocks that there are.
        blocks: u64,
        /// Blocks in flight at once, none of them twice.
        least: u16,
    },
    /// A queue's part of the range is too large.
    #[error("--verify: the range has {blocks} blocks for a queue, at most {most} can be tracked")]
    ManyBlocks {
        /// Blocks that there are.
        blocks: u64,
        /// Blocks that can be tracked.
        most: u64,
    },
    /// A request was not carried out.
    #[error("back-end: queue {queue}: {request} of {bytes} bytes at offset {offset}: {answer}")]
    Request {
        /// The queue.
        queue: usize,
        /// What the request was.
        request: &'static str,
        /// Bytes of it.
        bytes: u32,
        /// Where on the disk.
        offset: u64,
        /// What came back.
        answer: String,
    },
    /// A block is not what was written.
    #[error("verify")]
    Verify(#[source] blk::Mismatch),
    /// Another thread met an error.
    #[error("stopped")]
    Stopped,
}

impl BenchError {
    /// Whether nothing was sent: what was asked for can't be done with this back-end, or there is
    /// none.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            BenchError::Connect { .. }
                | BenchError::Feature { .. }
                | BenchError::Queues { .. }
                | BenchError::Core(_)
                | BenchError::Cores(_)
                | BenchError::Descriptors { .. }
                | BenchError::TooMuch { .. }
                | BenchError::BlockSize { .. }
                | BenchError::ReadOnly { .. }
                | BenchError::Discard { .. }
                | BenchError::Range { .. }
                | BenchError::FewBlocks { .. }
                | BenchError::ManyBlocks { .. }
        )
    }

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
