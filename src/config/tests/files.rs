//! What is refused in a file, with its line.

use super::*;

#[test]
fn refused_files_name_the_line() {
    let net = "[[net]]\nsocket = \"/n\"\nlink = \"echo\"\n";
    for (text, message) in [
        ("[[net]]\nlink = \"tpa:t\"\nsocket = \"/n\"", {
            "FILE:2: net net0: link = \"tpa:t\": \
             unknown link kind \"tpa\" (known: tap, macvtap, xdp, wire, switch, echo, sink)"
        }),
        (
            "\n[[net]]\nname = \"a\"\nlink = \"echo\"",
            "FILE:2: net a: socket is missing",
        ),
        (
            "[engine]\ncores = [1, 9]\n",
            "FILE:2: engine: cores = [1, 9]: core 9 does not exist or is offline (online: 0-2,5)",
        ),
        (
            "[engine]\ncores = []",
            "FILE:2: engine: cores = []: must not be empty",
        ),
        (
            "[engine]\ncores = 1",
            "FILE:2: engine: cores = 1: expected a list",
        ),
        (
            "[engine]\ncores = [\"1\"]",
            "FILE:2: engine: cores = [\"1\"]: expected a whole number",
        ),
        (
            "[engine]\ncore = [1]",
            "FILE:2: engine: core = [1]: unknown key (known: cores, idle, placement, stop_timeout)",
        ),
        (
            "[engine]\nidle = true",
            "FILE:2: engine: idle = true: expected a string",
        ),
        (
            "[engine]\nstop_timeout = 1.5",
            "FILE:2: engine: stop_timeout = 1.5: expected a string",
        ),
        (
            "[[net]]\nqueues = \"2\"",
            "FILE:2: net net0: queues = \"2\": expected a whole number",
        ),
        (
            "[[net]]\nqueues = -2",
            "FILE:2: net net0: queues = -2: expected a whole number",
        ),
        (
            "[[net]]\nsocket_mode = 0o660",
            "FILE:2: net net0: socket_mode = 0o660: expected a string",
        ),
        (
            "[[blk]]\nread_only = 1",
            "FILE:2: blk disk0: read_only = 1: expected true or false",
        ),
        (
            "[[blk]]\nsocket = \"/b\"\nbackend = \"\"\"ram:\n1G\"\"\"",
            "FILE:3: blk disk0: backend = \"\"\"ram:: \
             expected a size such as 512, 64K, 100M, 10G or 1T",
        ),
        (
            "[net]\nlink = \"echo\"",
            "FILE:1: net = [net]: expected tables, [[net]]",
        ),
        ("blk = [1]", "FILE:1: blk = 1: expected tables, [[blk]]"),
        (
            "engine = 1",
            "FILE:1: engine = 1: expected a table, [engine]",
        ),
        (
            "[nets]",
            "FILE:1: unknown table \"nets\" (known: engine, net, blk, group, switch)",
        ),
        (
            "\ncores = 1",
            "FILE:2: unknown key \"cores\" (known: engine, net, blk, group, switch)",
        ),
        (
            "",
            "no device: give at least one --net or --blk, or [[net]] or [[blk]] in the file",
        ),
    ] {
        assert_eq!(
            load_text(text, Given::default()).unwrap_err(),
            message,
            "{text}"
        );
    }
    let twice = format!("{net}{net}");
    assert_eq!(
        load_text(&twice, Given::default()).unwrap_err(),
        "FILE:5: net net1: socket = \"/n\": already used by net net0"
    );
}

#[test]
fn files_that_are_not_toml_name_the_line() {
    for (text, line) in [
        ("[[net]]\nlink = echo\n", 2),
        ("a = 1\na = 2\n", 2),
        ("\n\n[[net]\n", 3),
    ] {
        let message = load_text(text, Given::default()).unwrap_err();
        assert!(message.starts_with(&format!("FILE:{line}: ")), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn a_missing_file_is_named_with_its_cause() {
    let given = Given {
        file: Some(PathBuf::from("/no/such.toml")),
        ..Given::default()
    };
    let error = load(&given, &machine()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--config \"/no/such.toml\": cannot be read"
    );
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "No such file or directory (os error 2)");
}

#[test]
fn unknown_keys_are_named_with_the_known_ones() {
    for (nets, blks, wanted) in [
        (
            &["name=a,socket=/n,link=echo,path=/x"][..],
            &[][..],
            "--net a: path = \"/x\": unknown key (known: name, socket, mode, link, ",
        ),
        (
            &[][..],
            &["name=a,socket=/n,path=/x,link=echo"][..],
            "--blk a: link = \"echo\": unknown key (known: name, socket, mode, path, format, ",
        ),
    ] {
        let error = load(&flags(nets, blks), &machine())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(wanted) && error.ends_with(')'), "{error}");
    }
}
