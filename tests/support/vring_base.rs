//! A relay for one vhost-user connection that corrects SET_VRING_BASE for packed rings.
//!
//! The base of a packed ring carries wrap counters beside its indexes, and a fresh ring begins with
//! both at 1 (VIRTIO 1.3 §2.8.1; vhost-user, "Vring descriptor indices for packed virtqueues").
//! virtio-driver 0.6 sends 0 nevertheless, a ring in its second lap, and waits for ever. Here that
//! 0 becomes what it means; everything else passes as it is, with its file descriptor.
#![expect(unreachable_pub, reason = "a module of one test binary")]

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SET_VRING_BASE: u32 = 10;
const HEADER_BYTES: usize = 12;
/// What a vring state has in front of the base: the vring's index.
const BASE_AT: usize = HEADER_BYTES + 4;
/// Both indexes 0, both wrap counters 1.
const FRESH_PACKED: u32 = 0x8000_8000;

/// The relay's socket, which the front-end connects to. Its threads end with the connection.
pub struct Relay(PathBuf);

impl Relay {
    /// Takes one connection at [`Relay::path`], for the daemon's `socket`.
    pub fn start(socket: &Path) -> Relay {
        let path = socket.with_extension("relay");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("the relay listens");
        let socket = socket.to_owned();
        thread::spawn(move || {
            let (front, _) = listener.accept().expect("a front-end");
            let back = UnixStream::connect(socket).expect("the daemon listens");
            let mut from = back.try_clone().expect("a second descriptor");
            let mut to = front.try_clone().expect("a second descriptor");
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            while let Ok(true) = forward(&front, &back) {}
            let _ = back.shutdown(Shutdown::Both);
        });
        Relay(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Moves one message; `false` when there is none any more.
fn forward(front: &UnixStream, back: &UnixStream) -> io::Result<bool> {
    let mut message = vec![0; HEADER_BYTES];
    let (bytes, file) = front.recv_with_fd(&mut message)?;
    if bytes == 0 {
        return Ok(false);
    }
    let mut front = front;
    front.read_exact(&mut message[bytes..])?;
    let word = |message: &[u8], at: usize| {
        u32::from_le_bytes(message[at..at + 4].try_into().expect("four bytes"))
    };
    let size = usize::try_from(word(&message, 8)).expect("32 bits");
    message.resize(HEADER_BYTES + size, 0);
    front.read_exact(&mut message[HEADER_BYTES..])?;
    if word(&message, 0) == SET_VRING_BASE && word(&message, BASE_AT) == 0 {
        message[BASE_AT..BASE_AT + 4].copy_from_slice(&FRESH_PACKED.to_le_bytes());
    }
    let fds: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = back.send_with_fds(&[&message[..]], &fds)?;
    if sent != message.len() {
        return Err(ErrorKind::WriteZero.into());
    }
    Ok(true)
}
