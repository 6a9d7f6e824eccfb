//! The `vringd` command: arguments to settings to daemon to exit status.
//!
//! 0 is a clean end, 1 an end with something lost, 2 a command line or configuration that was
//! refused before anything was started. docs/operations.md has the operator's view.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use vringd::cli::{self, Action};
use vringd::config::{self, Machine};
use vringd::{daemon, logging, sys};

const REFUSED: u8 = 2;
const NOT_DRAINED: u8 = 1;

fn main() -> ExitCode {
    let invocation = match cli::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => {
            error.print();
            return ExitCode::from(error.exit_status());
        }
    };
    if let Err(error) = logging::init(invocation.log_level) {
        return refused(&error);
    }
    let (Action::Run(given) | Action::Check(given)) = &invocation.action;
    let online_cores = match sys::cpu::online_cores() {
        Ok(cores) => cores,
        Err(error) => return refused(&error),
    };
    let machine = Machine {
        online_cores,
        user_id: sys::users::user_id,
        group_id: sys::users::group_id,
    };
    let config = match config::load(given, &machine) {
        Ok(config) => config,
        Err(error) => return refused(&error),
    };
    if let Action::Check(_) = invocation.action {
        let (nets, blks) = (config.nets.len(), config.blks.len());
        // The exit status says the same when nobody reads the line.
        let _ = writeln!(io::stdout(), "valid: {nets} network ports, {blks} disks");
        return ExitCode::SUCCESS;
    }
    match daemon::run(&config) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_DRAINED),
        Err(error) => refused(&error),
    }
}

/// One line: the error and what caused it.
fn refused(error: &dyn Error) -> ExitCode {
    let mut line = format!("vringd: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::from(REFUSED)
}
