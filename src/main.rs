//! The `vringd` command: arguments to settings to daemon to exit status.
//!
//! 0 is a clean end, 1 an end with something lost or a measurement that came to nothing, 2 a
//! command line or configuration that was refused before anything was started.
//! docs/operations.md has the operator's view.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use vringd::bench::BenchError;
use vringd::cli::{self, Action};
use vringd::config::{self, BenchBlkGiven, BenchNetGiven, HelperGiven, Machine};
use vringd::{bench, daemon, helper, logging, sys};

const REFUSED: u8 = 2;
const FAILED: u8 = 1;

fn main() -> ExitCode {
    sys::panics::abort_elsewhere();
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
    let online_cores = match sys::cpu::online_cores() {
        Ok(cores) => cores,
        Err(error) => return refused(&error),
    };
    let given = match &invocation.action {
        Action::Run(given) | Action::Check(given) => given,
        Action::BenchNet(given) => return bench_net(given, &online_cores),
        Action::BenchBlk(given) => return bench_blk(given, &online_cores),
        Action::XdpHelper(given) => return xdp_helper(given),
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
    let reload = || config::load(given, &machine);
    let ended = daemon::run(config, &reload);
    logging::finish();
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAILED),
        Err(error) => refused(&error),
    }
}

/// Ends here only when something is wrong.
fn xdp_helper(given: &HelperGiven) -> ExitCode {
    match given.places() {
        Ok(places) => refused(&helper::become_command(&places, given)),
        Err(error) => refused(&error),
    }
}

fn bench_net(given: &BenchNetGiven, online_cores: &[usize]) -> ExitCode {
    match config::load_bench_net(given, online_cores) {
        Ok(config) => {
            let report = bench::net::run(&config);
            let report = report.map(|report| (report.json(), report));
            print_report(report, config.json)
        }
        Err(error) => refused(&error),
    }
}

fn bench_blk(given: &BenchBlkGiven, online_cores: &[usize]) -> ExitCode {
    match config::load_bench_blk(given, online_cores) {
        Ok(config) => {
            let report = bench::blk::run(&config);
            let report = report.map(|report| (report.json(), report));
            print_report(report, config.json)
        }
        Err(error) => refused(&error),
    }
}

/// Prints what was measured, as JSON or as a table.
fn print_report(
    report: Result<(impl fmt::Display, impl fmt::Display), BenchError>,
    json: bool,
) -> ExitCode {
    let mut out = io::stdout();
    let printed = match report {
        Ok((object, _)) if json => writeln!(out, "{object}"),
        Ok((_, table)) => writeln!(out, "{table}"),
        Err(error) if error.is_refusal() => return refused(&error),
        Err(error) => {
            complain(&error);
            return ExitCode::from(FAILED);
        }
    };
    if printed.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    }
}

fn refused(error: &dyn Error) -> ExitCode {
    complain(error);
    ExitCode::from(REFUSED)
}

/// One line: the error and what caused it.
fn complain(error: &dyn Error) {
    let mut line = format!("vringd: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    let _ = writeln!(io::stderr(), "{line}");
}
