//! Rates of a port: how they are written, and what is refused.

use super::*;

fn rates(net: &str) -> Result<PortRates, String> {
    let nets = [&format!("name=a,socket=/n,link=echo,{net}")[..]];
    let config = load(&flags(&nets, &[]), &machine()).map_err(|error| error.to_string())?;
    Ok(config.nets[0].rates)
}

#[test]
fn each_direction_has_its_rates_and_both_have_one_burst() {
    let burst = Duration::from_millis(5);
    assert_eq!(
        rates("ingress_bits=100M,ingress_frames=2500,egress_bits=1G,rate_burst=5ms"),
        Ok(PortRates {
            ingress: Rates {
                count: Some(2500),
                size: Some(100_000_000),
                burst,
            },
            egress: Rates {
                count: None,
                size: Some(1_000_000_000),
                burst,
            },
        })
    );
    let written = r#"
        [[net]]
        socket = "/n"
        link = "echo"
        egress_frames = 7
        egress_bits = "10k"
    "#;
    let config = load_text(written, Given::default()).unwrap();
    let egress = config.nets[0].rates.egress;
    assert_eq!((egress.count, egress.size), (Some(7), Some(10_000)));
}

#[test]
fn refused_rates_name_key_and_value() {
    for (net, message) in [
        (
            "ingress_bits=0",
            "--net a: ingress_bits = \"0\": expected a rate in a second such as 2500, 100k, \
             100M or 10G",
        ),
        (
            "egress_frames=1.5k",
            "--net a: egress_frames = \"1.5k\": expected a rate in a second such as 2500, 100k, \
             100M or 10G",
        ),
        (
            "rate_burst=2s",
            "--net a: rate_burst = \"2s\": expected a duration from 1ms to 1s",
        ),
    ] {
        assert_eq!(rates(net).unwrap_err(), message);
    }
}
