//! The log with the real daemon: who reads it may stop reading, and no guest is to wait for that.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the tests beside them")]
#[allow(dead_code, reason = "not all of them are needed here")]
#[path = "protocol"]
mod protocol {
    pub mod fake;
    pub mod front_end;
    pub mod guest;
    pub mod message;
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;

    use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver};

    use super::protocol::guest::{Guest, PATIENCE};
    use super::support::deadline::wait_until;
    use super::support::program::Program;
    use super::support::tmp::TempDir;

    /// Where a guest of this test has no memory.
    const NOWHERE: u64 = 1 << 50;

    /// Fills the pipe that `log` is an end of.
    fn fill(log: &impl AsRawFd) {
        // Opened anew: not to wait is a flag of the open file, which the daemon shares.
        let mut pipe = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", log.as_raw_fd()))
            .unwrap();
        // A pipe takes up to a page as a whole or not at all.
        for piece in [&[b'\n'; 4096][..], b"\n"] {
            while pipe.write(piece).is_ok() {}
        }
    }

    /// Two guests of one worker: the ring of one breaks while the log stands still.
    fn a_log_that_nobody_reads_holds_up_no_guest<D: Driver>() {
        let directory = TempDir::new("log");
        let sockets = ["victim", "neighbour"].map(|name| directory.path(name));
        let (unread, log) = std::io::pipe().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
        command.args(["run", "--core", "0", "--idle", "adaptive"]);
        for socket in &sockets {
            let net = format!("socket={},link=echo", socket.display());
            command.args(["--net", &net]);
        }
        let stderr = log.try_clone().unwrap();
        command.stdout(Stdio::piped()).stderr(stderr);
        let mut daemon = Program(command.spawn().unwrap());
        // Only the daemon has its end now, and this test to fill it.
        drop(command);
        let out = BufReader::new(daemon.0.stdout.take().unwrap());
        let ready = out
            .lines()
            .map_while(Result::ok)
            .find(|line| line == "ready");
        assert!(ready.is_some(), "the daemon ended");

        let [mut victim, mut neighbour] = sockets.map(|socket| Guest::<D>::connect(&socket, 0, 1));
        victim.echo(0);
        neighbour.echo(0);
        fill(&log);
        let ring = &mut victim.queues[1];
        ring.driver.add(&[Buf::readable(NOWHERE, 100)]).unwrap();
        if ring.driver.publish() {
            ring.kick.write(1).unwrap();
        }
        for _ in 0..500 {
            neighbour.echo(0);
        }
        // It is said as soon as somebody reads.
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(unread).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        wait_until("the word of a broken ring", PATIENCE, || {
            let mut lines = lines.try_iter();
            lines.find(|line| line.contains("ring broken by its driver"))
        });
        daemon.end();
        drop(log);
        reader.join().unwrap();
    }

    #[test]
    fn a_log_that_nobody_reads_holds_up_no_guest_on_split_rings() {
        a_log_that_nobody_reads_holds_up_no_guest::<SplitDriver>();
    }

    #[test]
    fn a_log_that_nobody_reads_holds_up_no_guest_on_packed_rings() {
        a_log_that_nobody_reads_holds_up_no_guest::<PackedDriver>();
    }
}
