//! Whole switches: how they are written, and what is refused.

use super::*;

fn loaded(switches: &[&str]) -> Result<Vec<SwitchConfig>, String> {
    let given = Given {
        switches: switches.iter().map(|&list| list.to_owned()).collect(),
        ..flags(
            &["name=n,socket=/n,link=switch:a", "socket=/m,link=switch:b"],
            &[],
        )
    };
    let config = load(&given, &machine());
    config
        .map(|config| config.switches)
        .map_err(|error| error.to_string())
}

fn switch(name: &str, ageing: u32) -> SwitchConfig {
    SwitchConfig {
        name: name.to_owned(),
        ageing,
    }
}

#[test]
fn a_switch_may_have_its_ageing_time() {
    assert_eq!(loaded(&[]).unwrap(), []);
    assert_eq!(loaded(&["name=b"]).unwrap(), [switch("b", 300)]);
    assert_eq!(
        loaded(&["name=b,ageing=10", "name=a,ageing=1000000"]).unwrap(),
        [switch("b", 10), switch("a", 1_000_000)]
    );
    let file = "[[switch]]\nname = \"lan\"\nageing = 60\n\
                [[net]]\nname = \"lan\"\nsocket = \"/n\"\nlink = \"switch:lan\"\n";
    let config = load_text(file, Given::default()).unwrap();
    assert_eq!(config.switches, [switch("lan", 60)]);
}

#[test]
fn refused_switches_name_key_and_value() {
    let range = "not in 10..=1000000";
    for (lists, message) in [
        (
            &["ageing=20"][..],
            "--switch switch0: name is missing".to_owned(),
        ),
        (
            &["name=a,ageing=9"],
            format!("--switch a: ageing = \"9\": {range}"),
        ),
        (
            &["name=a,ageing=0"],
            format!("--switch a: ageing = \"0\": {range}"),
        ),
        (
            &["name=a,ageing=5000000000"],
            format!("--switch a: ageing = \"5000000000\": {range}"),
        ),
        (
            &["name=a,ageing=5s"],
            "--switch a: ageing = \"5s\": expected a whole number".to_owned(),
        ),
        (
            &["name=c"],
            "--switch c: name = \"c\": no guest has a port at this switch".to_owned(),
        ),
        (
            &["name=a", "name=a"],
            "--switch a: name = \"a\": already used by switch a".to_owned(),
        ),
        (
            &["name=a,vlan=7"],
            "--switch a: vlan = \"7\": unknown key (known: name, ageing)".to_owned(),
        ),
    ] {
        assert_eq!(loaded(lists).unwrap_err(), message);
    }
}
