//! A configuration file and flags, as somebody wrote them.

use std::collections::HashSet;

use crate::config::{Config, ConfigError, Given, Machine, load_text};

/// Lines that begin so are flags; the others are the file.
const NET: &str = "--net ";
const BLK: &str = "--blk ";
const GROUP: &str = "--group ";
const SWITCH: &str = "--switch ";
const CORE: &str = "--core ";

/// Reads `data` as a file and flags. Returns whether they were taken.
///
/// # Panics
/// When something does not hold.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = core::str::from_utf8(data) else {
        return false;
    };
    let mut given = Given::default();
    let mut file = String::new();
    for line in text.lines() {
        if let Some(list) = line.strip_prefix(NET) {
            given.nets.push(list.to_owned());
        } else if let Some(list) = line.strip_prefix(BLK) {
            given.blks.push(list.to_owned());
        } else if let Some(list) = line.strip_prefix(GROUP) {
            given.groups.push(list.to_owned());
        } else if let Some(list) = line.strip_prefix(SWITCH) {
            given.switches.push(list.to_owned());
        } else if let Some(cores) = line.strip_prefix(CORE) {
            given.cores = Some(cores.to_owned());
        } else {
            file.push_str(line);
            file.push('\n');
        }
    }
    let machine = Machine {
        online_cores: vec![0, 1, 5],
        user_id: |name| Ok((name == "root").then_some(0)),
        group_id: |name| Ok((name == "kvm").then_some(36)),
    };
    match load_text(&file, &given, &machine) {
        Ok(config) => {
            check(&config);
            true
        }
        Err(error) => {
            check_error(&error);
            false
        }
    }
}

fn check(config: &Config) {
    let devices = config.nets.len() + config.blks.len();
    assert!(devices > 0, "nothing to serve");
    let nets = config.nets.iter().map(|net| (&net.name, &net.socket));
    let blks = config.blks.iter().map(|blk| (&blk.name, &blk.socket));
    let mut names = HashSet::new();
    let mut sockets = HashSet::new();
    for (name, socket) in nets.chain(blks) {
        assert!(names.insert(name), "a name twice");
        assert!(sockets.insert(socket.source.to_string()), "a socket twice");
    }
    assert!(!config.engine.cores.is_empty());
    for net in &config.nets {
        assert!((1..=128).contains(&net.queues));
        assert!(
            net.cores
                .iter()
                .all(|core| config.engine.cores.contains(core))
        );
    }
    for blk in &config.blks {
        assert!((1..=128).contains(&blk.queues));
        assert!([512, 4096].contains(&blk.block_size));
        let group = blk.limits.group.as_ref();
        assert!(group.is_none_or(|name| config.groups.iter().any(|group| group.name == *name)));
    }
}

fn check_error(error: &ConfigError) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an error says something");
    assert!(!text.contains('\n'), "an error is one line: {text:?}");
}

/// Configurations to begin with, by name.
pub fn config_seeds() -> Vec<(String, Vec<u8>)> {
    const SEEDS: [(&str, &str); 7] = [
        (
            "file",
            "[engine]\ncores = [1, 5]\nidle = \"spin\"\nstop_timeout = \"500ms\"\n\
             [[net]]\nname = \"a\"\nsocket = \"/run/a\"\nlink = \"tap:tap0\"\nqueues = 2\n\
             mac = \"52:54:00:12:34:56\"\nmtu = 1500\n\
             socket_group = \"kvm\"\nsocket_mode = \"0660\"\n\
             [[blk]]\nsocket = \"fd:7\"\nbackend = \"ram:1M\"\nblock_size = 4096\nserial = \"s\"\n",
        ),
        (
            "flags",
            "--core 0,1\n--net socket=/a,link=echo,call_max_us=5\n\
             --blk socket=/b,backend=null:1G\n",
        ),
        (
            "limits",
            "[[group]]\nname = \"g\"\nread_bytes = \"10M\"\niops = 5000\nrate_burst = \"2s\"\n\
             --blk socket=/b,backend=null:1G,group=g,write_iops=1k,bytes=1G,rate_burst=5ms\n",
        ),
        (
            "wire",
            "--net name=a,socket=/a,link=wire:b,hold_us=7\n--net name=b,socket=/b,cores=5\n",
        ),
        (
            "switch",
            "--switch name=s,ageing=60\n--net socket=/a,link=switch:s\n\
             --net link=switch:s,host=xdp:e:fd=5:map=6,busy_poll=20,\
             tx_csum=offload\n",
        ),
        (
            "refused",
            "[[net]]\nlink = \"tpa:x\"\nsocket = 5\n[[blk]]\nqueues = 1.5\n",
        ),
        ("syntax", "[engine\ncores = \"\\u00e9"),
    ];
    let seed = |(name, text): (&str, &str)| (name.to_owned(), text.as_bytes().to_vec());
    SEEDS.into_iter().map(seed).collect()
}
