//! Log lines on stderr: one line per event, time in UTC, level, module, message, fields.
//!
//! The level is a flag; VRINGD_LOG, when set, replaces it by a filter by module
//! (`info,vringd::control=debug`). What is logged is up to the modules.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::MakeWriter;

/// The variable whose filter overrides the level.
pub const FILTER_VARIABLE: &str = "VRINGD_LOG";

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
    let subscriber = subscriber(filter, colours, io::stderr);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)
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
    use std::sync::mpsc::{Sender, channel};

    use tracing::subscriber::with_default;

    use super::*;

    /// Sends what is written to the test.
    struct Pipe(Sender<Vec<u8>>);

    impl io::Write for Pipe {
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
    fn a_malformed_filter_names_the_variable_and_the_value() {
        let error = filter(Level::Info, "vringd=loud").unwrap_err().to_string();
        assert!(
            error.starts_with("VRINGD_LOG = \"vringd=loud\": "),
            "{error}"
        );
    }
}
