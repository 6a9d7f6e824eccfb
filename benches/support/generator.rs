//! `vringd bench net` as the front-end, for `rings` and `scale`.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::net::{BackEnd, Mpps};
use crate::testpmd::RingPath;
use crate::turns::FRONT_END_CORE;

/// What it puts on a back-end, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) path: &'a RingPath,
    /// Bytes of a frame, or `mix`.
    pub(crate) size: &'a str,
    pub(crate) ring_size: u32,
    /// Frames in flight, on each device.
    pub(crate) frames: u32,
    pub(crate) time: Duration,
}

/// Frames per second that a back-end sends back to as many devices as there are sockets.
pub(crate) fn flooded(back_end: BackEnd, sockets: &[PathBuf], load: Load<'_>) -> Mpps {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vringd"));
    let format = if load.path.packed { "packed" } else { "split" };
    command
        .args(["bench", "net", "--json", "--mode", "flood"])
        .args(["--format", format, "--size", load.size])
        .args(["--ring-size", &load.ring_size.to_string()])
        .args(["--in-flight", &load.frames.to_string()])
        .args(["--core", &FRONT_END_CORE.to_string()])
        .args(["--duration", &format!("{}ms", load.time.as_millis())]);
    if load.path.in_order {
        command.arg("--in-order");
    }
    if load.path.mergeable {
        command.arg("--mergeable");
    }
    for socket in sockets {
        command.arg("--socket").arg(socket);
    }
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.expect("vringd was built with this bench");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let whole = [&found["lost"], &found["mismatched"]].map(Value::as_u64) == [Some(0); 2];
    assert!(whole, "frames were lost or changed: {found}");
    drop(back_end);
    Mpps(found["mpps"].as_f64().expect("a number in the report"))
}
