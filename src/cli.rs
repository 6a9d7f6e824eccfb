//! The command line: flags and their help. Nothing of clap leaves this module.
//!
//! Values of devices and of the engine are passed on as text: `config` understands them, in one
//! place for flags and file. Wrong usage ends with status 2, as a wrong configuration does.
#![forbid(unsafe_code)]

use std::ffi::OsString;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{BenchBlkGiven, BenchNetGiven, Given, HelperGiven};
use crate::logging::Level;

mod bench;
mod run;

use bench::BenchArgs;
use run::{CheckArgs, RunArgs};

const EXAMPLES: &str = "\
Examples:
  A disk from a file and a port on a tap interface, served by core 1:
    vringd run --core 1 \\
      --blk socket=/run/vringd/disk0.sock,path=disk.img \\
      --net socket=/run/vringd/net0.sock,link=tap:tap0

  The same from a file, checked first:
    vringd check --config /etc/vringd.toml
    vringd run --config /etc/vringd.toml";

const HELPER_EXAMPLES: &str = "\
Example:
  A port with two queues on eth1, in a daemon without any capability:
    vringd xdp-helper --link xdp:eth1:fd=5+6:map=7 --user vringd -- \
      vringd run --core 1 --net socket=/run/vringd/net0.sock,link=xdp:eth1:fd=5+6:map=7";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// How much to log.
    pub log_level: Level,
    /// What to do.
    pub action: Action,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve the devices until a signal ends it.
    Run(Given),
    /// Say whether the settings are valid.
    Check(Given),
    /// Load a network back-end and print what it does.
    BenchNet(BenchNetGiven),
    /// Load a disk's back-end and print what it does.
    BenchBlk(Box<BenchBlkGiven>),
    /// Open what takes capabilities, give these up, and become another program.
    XdpHelper(HelperGiven),
}

/// A command line that leads to no action: wrong usage, or a request for help or the version.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CliError(clap::Error);

impl CliError {
    /// Prints the message, in colour where a terminal shows it: help and version to stdout,
    /// wrong usage to stderr.
    pub fn print(&self) {
        // There is nowhere left to report a closed stream to.
        let _ = self.0.print();
    }

    /// 0 after help and version, else 2.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if self.0.use_stderr() { 2 } else { 0 }
    }
}

/// Understands the arguments, the first being the program's name.
///
/// # Errors
/// Wrong usage; and help and version, which are not errors to the user.
pub fn parse<I>(arguments: I) -> Result<Invocation, CliError>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let cli = Cli::try_parse_from(arguments).map_err(CliError)?;
    let action = match cli.command {
        Command::Run(run) => Action::Run(run.given()),
        Command::Check(check) => Action::Check(check.given()),
        Command::Bench(bench) => bench.action(),
        Command::XdpHelper(helper) => Action::XdpHelper(HelperGiven {
            links: helper.link,
            user: helper.user,
            busy_poll: helper.busy_poll,
            command: helper.command,
        }),
    };
    Ok(Invocation {
        log_level: cli.log_level,
        action,
    })
}

/// Serves virtio-net and virtio-blk devices to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "vringd", version, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    /// How much to log to stderr; VRINGD_LOG overrides it with a filter by module
    #[arg(long, global = true, value_name = "LEVEL", value_enum, default_value_t)]
    log_level: Level,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve devices until SIGTERM or SIGINT
    #[command(after_help = EXAMPLES)]
    Run(RunArgs),
    /// Say whether a configuration file is valid, and serve nothing
    Check(CheckArgs),
    /// Load a vhost-user back-end, be it vringd or another, and print what it does
    Bench(Box<BenchArgs>),
    /// Open AF_XDP sockets, give up all capabilities, and become a command that uses them
    #[command(after_help = HELPER_EXAMPLES)]
    XdpHelper(HelperArgs),
}

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
struct HelperArgs {
    /// An interface, the numbers that its sockets get (one for each queue, from 0 on), and that of
    /// the map; several for as many interfaces
    #[arg(long, value_name = "xdp:IFACE:fd=N[+N]...[:map=N]", required = true)]
    link: Vec<String>,

    /// Run the command as this user, in the user's groups [default: the same as now]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,

    /// Have the sockets polled for so long, where the ports have the key busy_poll
    #[arg(long, value_name = "MICROSECONDS")]
    busy_poll: Option<String>,

    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl ValueEnum for Level {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::CommandFactory;

    use super::*;

    pub(super) fn parse_line(line: &str) -> Result<Invocation, CliError> {
        parse(line.split_whitespace())
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_passes_its_values_on_as_text() {
        let line = "vringd run --core 1,2 --idle spin --placement auto --stop-timeout 3s \
                    --net a=1 --blk b=2 --group g=3 --switch s=4 \
                    --net c=3 --config f.toml --log-level debug";
        let given = Given {
            file: Some(PathBuf::from("f.toml")),
            cores: Some("1,2".to_owned()),
            idle: Some("spin".to_owned()),
            placement: Some("auto".to_owned()),
            stop_timeout: Some("3s".to_owned()),
            nets: vec!["a=1".to_owned(), "c=3".to_owned()],
            blks: vec!["b=2".to_owned()],
            groups: vec!["g=3".to_owned()],
            switches: vec!["s=4".to_owned()],
        };
        let expected = Invocation {
            log_level: Level::Debug,
            action: Action::Run(given),
        };
        assert_eq!(parse_line(line).unwrap(), expected);
    }

    #[test]
    fn check_takes_a_file_and_the_level_is_info() {
        let given = Given {
            file: Some(PathBuf::from("f.toml")),
            ..Given::default()
        };
        let expected = Invocation {
            log_level: Level::Info,
            action: Action::Check(given),
        };
        assert_eq!(
            parse_line("vringd check --config f.toml").unwrap(),
            expected
        );
    }

    #[test]
    fn what_follows_the_dashes_is_the_helpers_command() {
        let line = "vringd xdp-helper --link a --user u --busy-poll 9 --link b -- run --link c";
        let given = HelperGiven {
            links: vec!["a".to_owned(), "b".to_owned()],
            user: Some("u".to_owned()),
            busy_poll: Some("9".to_owned()),
            command: ["run", "--link", "c"].map(OsString::from).to_vec(),
        };
        assert_eq!(parse_line(line).unwrap().action, Action::XdpHelper(given));
        let example = HELPER_EXAMPLES.replace("\\\n", " ");
        let line = example.lines().find(|line| line.contains("xdp-helper"));
        parse_line(line.unwrap().trim()).unwrap();
    }

    #[test]
    fn wrong_usage_names_the_culprit_with_status_2() {
        for (line, culprit) in [
            ("vringd", "Usage"),
            ("vringd fly", "fly"),
            ("vringd run --cores 1", "--cores"),
            ("vringd run extra", "extra"),
            ("vringd run --core 1 --core 2", "--core"),
            ("vringd run --net", "--net"),
            ("vringd check", "--config"),
            ("vringd bench", "net"),
            ("vringd xdp-helper --user u -- a", "--link"),
            ("vringd xdp-helper --link xdp:e:fd=5", "COMMAND"),
            ("vringd bench net", "--socket"),
            ("vringd bench net --socket /s --queue 1", "--queue"),
            ("vringd run --log-level loud", "loud"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert_eq!(error.exit_status(), 2, "{line}");
            assert!(error.to_string().contains(culprit), "{line}: {error}");
        }
    }

    #[test]
    fn help_and_version_are_no_failure() {
        for line in [
            "vringd --help",
            "vringd run --help",
            "vringd check -h",
            "vringd bench net --help",
            "vringd xdp-helper --help",
            "vringd bench blk --help",
            "vringd --version",
        ] {
            assert_eq!(parse_line(line).unwrap_err().exit_status(), 0, "{line}");
        }
        let version = parse_line("vringd --version").unwrap_err().to_string();
        assert_eq!(version, format!("vringd {}\n", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn help_has_two_examples_that_parse() {
        for line in ["vringd --help", "vringd run --help"] {
            let help = parse_line(line).unwrap_err().to_string();
            assert!(help.contains(EXAMPLES), "{help}");
        }
        let joined = EXAMPLES.replace("\\\n", " ");
        let examples: Vec<&str> = joined
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("vringd "))
            .collect();
        assert_eq!(examples.len(), 3);
        for example in examples {
            parse_line(example).unwrap();
        }
    }
}
