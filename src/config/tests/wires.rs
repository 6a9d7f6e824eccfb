//! Wires: which ends belong together, and what contradicts that.

use super::*;

fn links(nets: &[&str]) -> Result<Vec<LinkConfig>, String> {
    let config = load(&flags(nets, &[]), &machine()).map_err(|error| error.to_string())?;
    Ok(config.nets.into_iter().map(|net| net.link).collect())
}

#[test]
fn one_side_suffices_and_both_may_say_it() {
    let wires = |nets: &[&str]| {
        let joined = [LinkConfig::Wire("b".into()), LinkConfig::Wire("a".into())];
        assert_eq!(links(nets).unwrap(), joined);
    };
    wires(&["socket=/1,name=a,link=wire:b", "socket=/2,name=b"]);
    wires(&["socket=/1,name=a", "socket=/2,name=b,link=wire:a"]);
    wires(&[
        "socket=/1,name=a,link=wire:b",
        "socket=/2,name=b,link=wire:a",
    ]);
}

#[test]
fn the_hold_of_one_side_is_that_of_both_unless_the_other_has_its_own() {
    let holds = |second: &str| {
        let nets = ["socket=/1,name=a,link=wire:b,hold_us=7", second];
        let config = load(&flags(&nets, &[]), &machine()).unwrap();
        [0, 1].map(|net| config.nets[net].hold.as_micros())
    };
    assert_eq!(holds("socket=/2,name=b"), [7, 7]);
    assert_eq!(holds("socket=/2,name=b,hold_us=0"), [7, 0]);
}

#[test]
fn what_does_not_fit_together_is_refused_where_it_was_written() {
    for (nets, message) in [
        (
            ["socket=/1,name=a,link=wire:c", "socket=/2,name=b"],
            r#"--net a: link = "wire:c": there is no port "c""#,
        ),
        (
            ["socket=/1,name=a,link=wire:a", "socket=/2,name=b,link=echo"],
            "--net a: link = \"wire:a\": a wire joins two ports \
             (to get its own frames back, a port has link = \"echo\")",
        ),
        (
            ["socket=/1,name=a,link=wire:b", "socket=/2,name=b,link=echo"],
            "--net a: link = \"wire:b\": port b has link = \"echo\" \
             (give the wire on one side, or the same on both)",
        ),
        (
            ["socket=/1,name=a,link=echo", "socket=/2,name=b"],
            "--net b: link is missing",
        ),
        (
            ["socket=/1,link=echo,hold_us=5", "socket=/2,link=echo"],
            r#"--net net0: hold_us = "5": only has a meaning with link = "wire:…""#,
        ),
        (
            ["socket=/1,link=echo,cores=3", "socket=/2,link=echo"],
            r#"--net net0: cores = "3": core 3 has no worker (engine.cores: 5)"#,
        ),
    ] {
        assert_eq!(links(&nets).unwrap_err(), message);
    }
    let three = [
        "socket=/1,name=a,link=wire:b",
        "socket=/2,name=b",
        "socket=/3,name=c,link=wire:b",
    ];
    assert_eq!(
        links(&three).unwrap_err(),
        "--net c: link = \"wire:b\": port b has a wire to a already \
         (give the wire on one side, or the same on both)"
    );
}
