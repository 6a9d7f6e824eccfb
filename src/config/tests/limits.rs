//! Limits of disks and groups: how they are written, and what is refused.

use super::*;

fn loaded(blk: &str, groups: &[&str]) -> Result<Config, String> {
    let given = Given {
        groups: groups.iter().map(|&list| list.to_owned()).collect(),
        ..flags(&[], &[&format!("name=d,socket=/d,backend=null:1G,{blk}")])
    };
    load(&given, &machine()).map_err(|error| error.to_string())
}

#[test]
fn reads_writes_and_both_have_their_rates_and_one_burst() {
    let config = loaded(
        "read_iops=1k,write_iops=200,iops=1100,read_bytes=10M,write_bytes=5M,bytes=1G,\
         rate_burst=3600s,group=g",
        &["name=g,iops=9"],
    );
    let config = config.unwrap();
    let burst = Duration::from_secs(3600);
    let rates = |count, size| Rates {
        count: Some(count),
        size: Some(size),
        burst,
    };
    let want = BlkLimits {
        rates: DiskRates {
            read: rates(1000, 10_000_000),
            write: rates(200, 5_000_000),
            total: rates(1100, 1_000_000_000),
        },
        group: Some("g".to_owned()),
    };
    assert_eq!(config.blks[0].limits, want);
    assert_eq!(config.groups[0].name, "g");
    assert_eq!(config.groups[0].rates.total.count, Some(9));
    assert_eq!(
        config.groups[0].rates.total.burst,
        Duration::from_millis(100)
    );
}

#[test]
fn a_file_has_groups_before_or_after_their_disks() {
    let written = r#"
        [[group]]
        name = "d"
        read_bytes = "10k"
        [[blk]]
        name = "d"
        socket = "/d"
        backend = "null:1M"
        group = "e"
        write_iops = 7
        [[group]]
        name = "e"
        bytes = 1000
        rate_burst = "2s"
    "#;
    let config = load_text(written, Given::default()).unwrap();
    assert_eq!(config.blks[0].limits.group.as_deref(), Some("e"));
    assert_eq!(config.blks[0].limits.rates.write.count, Some(7));
    assert_eq!(config.groups[0].rates.read.size, Some(10_000));
    assert_eq!(config.groups[1].rates.total.size, Some(1000));
    assert_eq!(config.groups[1].rates.read.burst, Duration::from_secs(2));
}

#[test]
fn refused_limits_name_key_and_value() {
    const RATE: &str = "expected a rate in a second such as 2500, 100k, 100M or 10G";
    for (blk, group, message) in [
        ("iops=0", "name=g", format!("--blk d: iops = \"0\": {RATE}")),
        (
            "write_bytes=1.5M",
            "name=g",
            format!("--blk d: write_bytes = \"1.5M\": {RATE}"),
        ),
        (
            "rate_burst=3601s",
            "name=g",
            "--blk d: rate_burst = \"3601s\": expected a duration from 1ms to 3600s".to_owned(),
        ),
        (
            "group=h",
            "name=g",
            "--blk d: group = \"h\": there is no group \"h\"".to_owned(),
        ),
        (
            "iops=1",
            "iops=1",
            "--group group0: name is missing".to_owned(),
        ),
        (
            "iops=1",
            "name=a b",
            "--group a b: name = \"a b\": has ' ', only A-Z a-z 0-9 _ . - are possible".to_owned(),
        ),
        (
            "iops=1",
            "name=g,read_iops=-1",
            format!("--group g: read_iops = \"-1\": {RATE}"),
        ),
        (
            "iops=1",
            "name=g,group=g",
            "--group g: group = \"g\": unknown key (known: name, read_iops, write_iops, iops, \
             read_bytes, write_bytes, bytes, rate_burst)"
                .to_owned(),
        ),
    ] {
        assert_eq!(loaded(blk, &[group]).unwrap_err(), message);
    }
    let twice = loaded("iops=1", &["name=g", "name=g"]).unwrap_err();
    assert_eq!(twice, "--group g: name = \"g\": already used by group g");
    let file = load_text("group = 5\n", Given::default()).unwrap_err();
    let message = "FILE:1: group = 5: expected tables, [[group]]";
    assert_eq!(file.to_string(), message);
}
