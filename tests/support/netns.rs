//! A network namespace for one test: nothing that it does is seen outside.
#![expect(
    unsafe_code,
    reason = "setns is a system call without a safe wrapper here"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::Duration;

use super::tmp::unique;

/// A namespace that is removed at the end.
pub struct Netns(String);

impl Netns {
    /// A fresh namespace with its loopback up.
    pub fn new() -> Netns {
        let netns = Netns(format!("vt{}", unique()));
        let added = Command::new("ip").args(["netns", "add", &netns.0]).output();
        let added = added.expect("ip (package iproute2) runs");
        assert!(added.status.success(), "ip netns add: {added:?}");
        netns.ok("ip link set lo up");
        netns
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A command to be run in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// Runs a shell line in it.
    pub fn run(&self, line: &str) -> Output {
        self.command("sh")
            .args(["-c", line])
            .output()
            .expect("ip netns exec runs")
    }

    /// Runs a shell line that must succeed; returns what it printed.
    pub fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Netns {
    /// Runs `body` on a thread of its own inside the namespace; sockets made there belong to it.
    pub fn spawn<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let file = File::open(format!("/run/netns/{}", self.0)).expect("the namespace is there");
        std::thread::spawn(move || {
            // SAFETY: the descriptor is open; only this thread changes its namespace.
            let entered = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(entered, 0, "setns: {}", std::io::Error::last_os_error());
            body()
        })
    }

    /// What a web server at `address` answers for `path`.
    pub fn fetch(&self, address: &'static str, path: &'static str) -> Vec<u8> {
        let client = self.spawn(move || -> std::io::Result<Vec<u8>> {
            let mut stream = super::deadline::wait_until("a server", PATIENCE, || {
                TcpStream::connect(address).ok()
            });
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            while reader.read_line(&mut line)? > 2 {
                line.clear();
            }
            let mut body = Vec::new();
            reader.read_to_end(&mut body)?;
            Ok(body)
        });
        client
            .join()
            .expect("the client does not panic")
            .expect("the server answers")
    }

    /// A web server at `address` that answers one GET with `answer`, listening already. A thread of
    /// its own; it gives up after 30 s without a client.
    pub fn serve_once(&self, address: &'static str, answer: Vec<u8>) -> JoinHandle<()> {
        let (bound, listens) = std::sync::mpsc::channel();
        let server = self.spawn(move || {
            let listener = TcpListener::bind(address).expect("the namespace has the address");
            bound.send(()).expect("who started us waits");
            listener.set_nonblocking(true).expect("non-blocking");
            let (stream, _) =
                super::deadline::wait_until("a client", PATIENCE, || listener.accept().ok());
            stream.set_nonblocking(false).expect("blocking");
            stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
            serve(stream, &answer).expect("the client goes on");
        });
        listens.recv().expect("the server listens");
        server
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

fn serve(stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
        answer.len()
    );
    (&stream).write_all(head.as_bytes())?;
    (&stream).write_all(answer)?;
    stream.shutdown(std::net::Shutdown::Write)
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}
