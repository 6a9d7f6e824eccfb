//! The flags of `vringd run` and `vringd check`.

use std::path::PathBuf;

use clap::Args;

use crate::config::Given;

#[derive(Debug, Args)]
#[command(max_term_width = 100)]
pub(super) struct RunArgs {
    /// TOML file with [engine], [[net]], [[blk]], [[group]] and [[switch]]; its keys are those of
    /// the flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Cores to run on, one pinned worker each [default: the last that is online]
    #[arg(long, value_name = "N[,N]...")]
    core: Option<String>,

    /// What a worker without work does: spin, adaptive or interrupt [default: adaptive]
    #[arg(long, value_name = "POLICY")]
    idle: Option<String>,

    /// How workers are chosen for queues: spread or auto, near to the guest's memory
    /// [default: spread]
    #[arg(long, value_name = "HOW")]
    placement: Option<String>,

    /// How long a shutdown waits for requests in flight: 10s, 500ms [default: 10s]
    #[arg(long, value_name = "TIME")]
    stop_timeout: Option<String>,

    /// Add a network port; needs socket and link (tap:NAME, tap:fd=N, macvtap:NAME,
    /// xdp:IFACE, xdp:IFACE:fd=N:map=N, xdp:IFACE:fdname=NAME:mapname=NAME, wire:PORT,
    /// switch:NAME, echo, sink).
    /// With host (tap:NAME, macvtap:NAME, xdp:IFACE) instead of socket: an interface at a switch.
    /// Also: name, mode, queues, netns, persist, busy_poll, tx_csum, mac, mtu, link_follows,
    /// speed, duplex, cores, hold_us, ingress_bits, ingress_frames, egress_bits, egress_frames,
    /// rate_burst, vlan, vlan_native, isolated, flood_limit, allow_mac, allow_ip, stations,
    /// ring_reset, memory_files, call_max_used, call_max_us, socket_owner, socket_group,
    /// socket_mode
    #[arg(long, value_name = "KEY=VALUE,...")]
    net: Vec<String>,

    /// Add a disk; needs socket, and path or backend (ram:SIZE, null:SIZE). Also: name, mode,
    /// format, backing_dir, queues, read_only, direct, iopoll, sqpoll, fixed_buffers, cache, lock,
    /// fault, on_enospc, io_timeout, discard, encrypt, encrypt_sector, key_file, key_fd, serial,
    /// block_size, cores, ring_reset, memory_files, call_max_used, call_max_us, socket_owner,
    /// socket_group, socket_mode, read_iops, write_iops, iops, read_bytes, write_bytes, bytes,
    /// rate_burst, group
    #[arg(long, value_name = "KEY=VALUE,...")]
    blk: Vec<String>,

    /// Add limits that the disks with group=NAME share; needs name. Also: read_iops, write_iops,
    /// iops, read_bytes, write_bytes, bytes, rate_burst
    #[arg(long, value_name = "KEY=VALUE,...")]
    group: Vec<String>,

    /// Choose for the switch of all ports with link=switch:NAME; needs name. Also: ageing
    #[arg(long, value_name = "KEY=VALUE,...")]
    switch: Vec<String>,
}

impl RunArgs {
    pub(super) fn given(self) -> Given {
        Given {
            file: self.config,
            cores: self.core,
            idle: self.idle,
            placement: self.placement,
            stop_timeout: self.stop_timeout,
            nets: self.net,
            blks: self.blk,
            groups: self.group,
            switches: self.switch,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The TOML file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl CheckArgs {
    pub(super) fn given(self) -> Given {
        Given {
            file: Some(self.config),
            ..Given::default()
        }
    }
}
