//! The network between a guest and the host: iperf3 and ping.

use super::clock::{Moment, median, ns};
use super::figures::FigureId;
use super::guest::Guest;
use super::inside::Sink;
use super::start::poll;
use super::vmm::Vmm;
use crate::case::Failure;
use crate::check;
use serde_json::Value;
use std::process::{Command, Stdio};

/// The host's address on the TAP, with its prefix.
pub const HOST: &str = "172.31.0.1/24";
const GUEST: &str = "172.31.0.2";
/// What TCP moves: enough to make its slow start count for nothing.
const TCP: &str = "-n 192M -l 128K";
/// As fast as the sender can, with a payload as in a packet of 100 bytes. For a time: of a number of packets some are
/// lost, and the receiver would wait for them.
const UDP: &str = "-u -b 0 -l 58 -t 1";
/// Prints how many datagrams have reached sockets so far.
const DATAGRAMS: &str = "awk '/^Udp:/ { n = $2 } END { print n }' /proc/net/snmp";
const PINGS: &str = "100";

/// Measures with iperf3 in both directions, then with ping.
pub fn measure(vmm: &Vmm, guest: &mut Guest, sink: &Sink) -> Result<(), Failure> {
    let up =
        guest.ask(&format!("ip link set lo up && ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"))?;
    check!(up.is_empty(), "eth0: {up}");
    // The first packets may meet an end that is still coming up.
    let pinged = guest
        .ask("for n in 1 2 3 4 5; do ping -c 1 -W 2 172.31.0.1 >/dev/null && echo yes && break; done")?;
    check!(pinged == "yes", "no answer from the host: {pinged}");
    for (figure, load) in [
        (FigureId::TcpOut, TCP.to_owned()),
        (FigureId::TcpIn, format!("{TCP} -R")),
        (FigureId::UdpOut, UDP.to_owned()),
        (FigureId::UdpIn, format!("{UDP} -R")),
    ] {
        let before = (Moment::now()?, datagrams(guest, &load)?);
        let report = iperf3(guest, &load)?;
        let after = (Moment::now()?, datagrams(guest, &load)?);
        let idle = after.0.since(&before.0).idle();
        let rate = if load.contains("-u") {
            udp_rate(&report, after.1.saturating_sub(before.1))
        } else {
            tcp_rate(&report)
        };
        let rate = rate.ok_or_else(|| Failure(format!("iperf3 {load} reported {report}")))?;
        sink.sample(vmm, figure, rate, sink.counting.then_some(idle));
    }
    sink.sample(vmm, FigureId::Ping, ping()?, None);
    Ok(())
}

/// Runs the server here and the client in the guest: the server's report.
fn iperf3(guest: &mut Guest, load: &str) -> Result<Value, Failure> {
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-J", "-p", "5201"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Failure(format!("cannot start iperf3: {error}")))?;
    // Port 5201 in state LISTEN.
    let listens = poll("iperf3's socket", || {
        ["/proc/net/tcp", "/proc/net/tcp6"]
            .iter()
            .filter_map(|table| std::fs::read_to_string(table).ok())
            .any(|table| table.lines().any(|line| line.contains(":1451 ") && line.contains(" 0A ")))
    });
    let said = listens.and_then(|()| {
        guest.ask(&format!("iperf3 -c 172.31.0.1 -p 5201 {load} >/tmp/iperf 2>&1 || tail -n 2 /tmp/iperf"))
    });
    if !matches!(&said, Ok(said) if said.is_empty()) {
        // It would wait for its client for ever.
        server.kill()?;
        server.wait()?;
    }
    let said = said?;
    check!(said.is_empty(), "iperf3 in the guest: {said}");
    let output = server.wait_with_output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Gbit per 1e9 ns, of what has arrived as far as the server knows.
fn tcp_rate(report: &Value) -> Option<f64> {
    let end = &report["end"];
    let side = if report["start"]["test_start"]["reverse"] == 1 { "sum_sent" } else { "sum_received" };
    Some(end[side]["bits_per_second"].as_f64()? / 1e9)
}

/// Thousands of packets per 1e9 ns, of those that arrived.
fn udp_rate(report: &Value, arrived: u64) -> Option<f64> {
    Some(ns(arrived) / report["end"]["sum"]["seconds"].as_f64()? / 1e3)
}

/// How many datagrams have arrived at the end that receives under `load`.
fn datagrams(guest: &mut Guest, load: &str) -> Result<u64, Failure> {
    let count = if load.contains("-R") {
        guest.ask(DATAGRAMS)?
    } else {
        let output = Command::new("sh").args(["-c", DATAGRAMS]).output()?;
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    count.trim().parse().map_err(|_| Failure(format!("no count of datagrams in `{count}`")))
}

/// The median round trip in us (thousands of instructions), as the host's ping sees it.
fn ping() -> Result<f64, Failure> {
    let output = Command::new("ping").args(["-n", "-c", PINGS, "-i", "0.002", "-W", "5", GUEST]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut trips: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split_once(" time=")?.1.split(' ').next()?.parse().ok())
        .collect();
    check!(output.status.success(), "ping: {text}{}", String::from_utf8_lossy(&output.stderr));
    median(&mut trips).map(|milliseconds| milliseconds * 1e3).ok_or_else(|| Failure::new("no pings"))
}
