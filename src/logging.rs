//! Log lines on stderr: one line per event, time in UTC, level, module, message, fields.
//!
//! The level is a flag; VRINGD_LOG, when set, replaces it by a filter by module
//! (`info,vringd::control=debug`). What is logged is up to the modules.
//!
//! Who reads stderr may stop reading: a full pipe, a journal that stands still. A thread that must
//! not wait for that, with all guests that it serves, has said so (`sys::patience`): its lines go
//! to a thread that writes them, and are counted as lost when that one falls behind.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;

use crate::sys::patience::never_waits;

/// The variable whose filter overrides the level.
pub const FILTER_VARIABLE: &str = "VRINGD_LOG";

/// Lines of threads that never wait, until they are written.
const QUEUED_MAX: usize = 1024;
/// How long [`finish`] waits for them to be.
const FINISH_WITHIN: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// What went wrong on our side.
    Error,
    /// What the host or a front-end did wrong.
    Warn,
    /// Sessions as they come and go.
    #[default]
    Info,
    /// Each message of a session.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    /// All levels, from quiet to loud.
    pub const ALL: [Self; 5] = [
        Self::Error,
        Self::Warn,
        Self::Info,
        Self::Debug,
        Self::Trace,
    ];

    /// As it is written on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Logging that can't be set up as asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter of the environment is malformed.
    #[error("{FILTER_VARIABLE} = {value:?}: {problem}")]
    Filter {
        /// The filter.
        value: String,
        /// What the parser says.
        problem: ParseError,
    },
    /// Something else in this process logs already.
    #[error("logging is set up already")]
    Twice,
}

/// Starts logging to stderr. Once per process.
///
/// # Errors
/// A malformed VRINGD_LOG; or a second call.
pub fn init(level: Level) -> Result<(), LogError> {
    let variable = std::env::var_os(FILTER_VARIABLE).unwrap_or_default();
    let filter = filter(level, &variable.to_string_lossy())?;
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = || Line {
        queue: never_waits().then(|| QUEUE.get()).flatten(),
    };
    let subscriber = subscriber(filter, colours, lines);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)
}

/// Starts the thread that writes for those who never wait, which write themselves before. Its
/// signal mask and its cores are those of the caller.
///
/// # Errors
/// No thread is to be had.
pub fn start_writer() -> io::Result<()> {
    if QUEUE.get().is_none() {
        let tell = |count| tracing::warn!("{count} log lines were lost: nobody read them in time");
        let queue = Queue::start(|line| io::stderr().write_all(line), tell)?;
        let _ = QUEUE.set(queue);
    }
    Ok(())
}

/// Waits, not for long, until what was left to the writing thread is written. At the end.
pub fn finish() {
    if let Some(queue) = QUEUE.get() {
        let (done, finished) = bounded(1);
        let until = Instant::now() + FINISH_WITHIN;
        if queue
            .entries
            .send_deadline(Entry::Tell(done), until)
            .is_ok()
        {
            let _ = finished.recv_deadline(until);
        }
    }
}

/// What the writing thread is given.
#[derive(Debug)]
enum Entry {
    Line(Box<[u8]>),
    /// Lines were lost meanwhile.
    Lost,
    /// To be told when all before it is written.
    Tell(Sender<()>),
}

/// The way to the thread that writes for those who never wait.
#[derive(Debug)]
struct Queue {
    entries: Sender<Entry>,
    /// Lines that it was too full for, and that nobody was told of.
    lost: Arc<AtomicU64>,
}

impl Queue {
    /// Starts the thread, which writes each line by `write` and says by `tell` how many were lost.
    fn start(
        write: impl Fn(&[u8]) -> io::Result<()> + Send + 'static,
        tell: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Queue> {
        let (entries, queued) = bounded(QUEUED_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let run = move || write_queued(&queued, &counted, write, tell);
        let thread = std::thread::Builder::new().name("log".to_owned());
        thread.spawn(run)?;
        Ok(Queue { entries, lost })
    }

    fn put(&self, line: &[u8]) {
        if self.entries.try_send(Entry::Line(line.into())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            // The thread may have looked at the count, and emptied the queue, in between.
            let _ = self.entries.try_send(Entry::Lost);
        }
    }
}

/// Writes what is queued until nobody can queue anything any more.
fn write_queued(
    queued: &Receiver<Entry>,
    lost: &AtomicU64,
    write: impl Fn(&[u8]) -> io::Result<()>,
    tell: impl Fn(u64),
) {
    for entry in queued {
        if let Entry::Line(line) = &entry
            && write(line).is_err()
        {
            lost.fetch_add(1, Ordering::Relaxed);
        }
        let count = lost.swap(0, Ordering::Relaxed);
        if count > 0 {
            tell(count);
        }
        if let Entry::Tell(done) = entry {
            let _ = done.try_send(());
        }
    }
}

/// Where one line goes: to stderr, or to who writes it there.
struct Line<'a> {
    queue: Option<&'a Queue>,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.queue {
            Some(queue) => queue.put(line),
            None => io::stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn filter(level: Level, variable: &str) -> Result<EnvFilter, LogError> {
    let text = if variable.is_empty() {
        level.name()
    } else {
        variable
    };
    let parsed = EnvFilter::builder().parse(text);
    parsed.map_err(|problem| LogError::Filter {
        value: text.to_owned(),
        problem,
    })
}

fn subscriber<W>(filter: EnvFilter, colours: bool, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(writer)
        .finish()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, channel};

    use tracing::subscriber::with_default;

    use super::*;

    /// Sends what is written to the test.
    struct Pipe(mpsc::Sender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The log of `events`, without colours.
    fn logged(level: Level, variable: &str, events: impl FnOnce()) -> String {
        let (sender, receiver) = channel();
        let filter = filter(level, variable).unwrap();
        with_default(
            subscriber(filter, false, move || Pipe(sender.clone())),
            events,
        );
        let bytes: Vec<u8> = receiver.try_iter().flatten().collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_event_is_one_line_with_time_level_module_message_and_fields() {
        let line = logged(Level::Info, "", || {
            tracing::info!(target: "vringd::control", device = "disk0", "negotiated");
        });
        let (time, rest) = line.split_at("2026-11-20T22:30:55.000000Z".len());
        assert_eq!(
            rest,
            "  INFO vringd::control: negotiated device=\"disk0\"\n"
        );
        let shape: String = time
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
    }

    #[test]
    fn the_level_keeps_quieter_events_out() {
        for (level, lines) in Level::ALL.into_iter().zip(1..) {
            let log = logged(level, "", || {
                tracing::error!("1");
                tracing::warn!("2");
                tracing::info!("3");
                tracing::debug!("4");
                tracing::trace!("5");
            });
            assert_eq!(log.lines().count(), lines, "{level:?}: {log}");
        }
    }

    #[test]
    fn the_variable_overrides_the_level_by_module() {
        let log = logged(Level::Error, "warn,a=debug", || {
            tracing::debug!(target: "a", "kept");
            tracing::info!(target: "b", "dropped");
            tracing::warn!(target: "b", "kept");
        });
        assert_eq!(log.lines().count(), 2, "{log}");
        assert!(!log.contains("dropped"), "{log}");
    }

    #[test]
    fn who_never_waits_loses_lines_that_nobody_reads_and_it_is_said() {
        // Each line is written when somebody takes it.
        let (sender, written) = mpsc::sync_channel::<Vec<u8>>(0);
        let (told, lost) = channel();
        let write = move |line: &[u8]| sender.send(line.to_vec()).map_err(io::Error::other);
        let tell = move |count| told.send(count).unwrap_or_default();
        let queue = Queue::start(write, tell).unwrap();
        let mut to = Line {
            queue: Some(&queue),
        };
        let total = QUEUED_MAX + 500;
        for number in 0..total {
            to.write_all(number.to_string().as_bytes()).unwrap();
        }
        drop(queue);
        let kept: Vec<_> = written.iter().collect();
        assert_eq!(kept[0], b"0");
        let lost: u64 = lost.iter().sum();
        assert_eq!(kept.len() as u64 + lost, total as u64);
        assert!(lost >= 499, "{lost}");
    }

    #[test]
    fn a_malformed_filter_names_the_variable_and_the_value() {
        let error = filter(Level::Info, "vringd=loud").unwrap_err().to_string();
        assert!(
            error.starts_with("VRINGD_LOG = \"vringd=loud\": "),
            "{error}"
        );
    }
}
