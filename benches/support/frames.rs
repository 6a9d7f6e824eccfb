//! Frames into an interface, a burst at a time: this program once more, as a process of its own.
//!
//! It shares a core with the front-end that the frames are for, so it comes first there and pauses
//! after each burst.

use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use vringd::memory::copy;
use vringd::sys::xdp::{Xdp, XdpError};

use crate::support::netns::Netns;
use crate::turns::FRONT_END_CORE;

/// How it is told to be a generator.
const OPTION: &str = "--send-frames";

/// Frames of a burst: much less than what the rings hold while nobody empties them.
const BURST: usize = 256;

/// For the front-end to take a burst: several times as long as it needs.
const PAUSE: Duration = Duration::from_micros(100);

/// How much longer it sends than is measured: never the first to end, nor left behind for long.
const RESERVE: Duration = Duration::from_secs(10);

/// The command for frames of `size` bytes into an interface, for longer than `time`.
pub(crate) fn sender(netns: &Netns, interface: &str, size: u32, time: Duration) -> Command {
    let program = std::env::current_exe().expect("this program is somewhere");
    // Before all others on its core (a policy for real time, the lowest priority of it).
    let mut command = netns.command("chrt");
    command
        .args(["-f", "1", "taskset", "-c", &FRONT_END_CORE.to_string()])
        .arg(program)
        .args(["--bench", OPTION, interface, &size.to_string()])
        .arg((time + RESERVE).as_secs().to_string());
    command
}

/// Sends frames if the command line says so.
pub(crate) fn main() -> Option<ExitCode> {
    let mut args = std::env::args().skip_while(|arg| arg != OPTION).skip(1);
    let interface = args.next()?;
    let mut number = || args.next()?.parse::<u32>().ok();
    let (size, seconds) = (number()?, number()?);
    Some(
        match send(&interface, size, Duration::from_secs(seconds.into())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{OPTION}: {error}");
                ExitCode::FAILURE
            }
        },
    )
}

fn send(interface: &str, size: u32, time: Duration) -> Result<(), XdpError> {
    let xdp = Xdp::open(interface, 1, None)?;
    let mut socket = xdp.take_socket().expect("one was asked for");
    let mut frame = vec![0; size as usize];
    // Two addresses that are locally administered, and an EtherType for experiments.
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    let end = Instant::now() + time;
    while Instant::now() < end {
        socket.reap();
        for _ in 0..BURST {
            let Some(chunk) = socket.next_chunk() else {
                break;
            };
            copy::write(&[chunk], 0, &frame);
            socket.send(size, false);
        }
        socket.publish();
        let sent = socket.wake_sender();
        sent.expect("the interface is up as long as the namespace is there");
        thread::sleep(PAUSE);
    }
    Ok(())
}
