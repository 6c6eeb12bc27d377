//! The network, by the kernel's vhost and by ourselves.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Machine, Role, Tap, scan};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::thread::JoinHandle;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "net_userspace",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| pings(ctx, "off"),
    },
    Case { name: "net_vhost", needs: Needs::VM, timeout: Case::TIMEOUT, run: |ctx| pings(ctx, "on") },
    Case {
        name: "net_bulk_userspace",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| bulk(ctx, "off", 1),
    },
    Case { name: "net_bulk_vhost", needs: Needs::VM, timeout: Case::TIMEOUT, run: |ctx| bulk(ctx, "on", 1) },
    Case {
        name: "net_queues_userspace",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| one_queue_is_not_two(ctx).and_then(|()| bulk(ctx, "off", 2)),
    },
    Case {
        name: "net_queues_vhost",
        needs: Needs::VM,
        timeout: Case::TIMEOUT,
        run: |ctx| bulk(ctx, "on", 2),
    },
];

const HOST: &str = "172.30.1.1";
const GUEST: &str = "172.30.1.2";

fn pings(ctx: &Ctx, vhost: &str) -> Result<(), Failure> {
    let tap = Tap::create("pfnet0", &format!("{HOST}/24"))?;
    let mut vm = Machine::new(ctx)
        .net(&tap, &format!("{GUEST}/24"), HOST)
        .set("/network-interfaces/0/vhost", json!(vhost))
        .steps("net+wait")
        .start()?;
    let line = vm.wait_for_guest("net ")?;
    check!(line == format!("net ok peer={HOST} mac=06:00:ac:10:00:02"), "the guest said `{line}`");
    let workers = scan(vm.pid())?.iter().filter(|thread| thread.role == Role::Vhost).count();
    check!((workers > 0) == (vhost == "on"), "{workers} vhost workers with vhost {vhost}");

    let packets = tap.packets()?;
    // Small and large, so that more than one buffer is used for a packet where that is so.
    for size in ["56", "1472"] {
        let output = Command::new("ping").args(["-c", "3", "-W", "20", "-s", size, GUEST]).output()?;
        check!(
            output.status.success(),
            "no answer to {size} bytes: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    check!(tap.packets()? > packets, "no packet of the guest's passed the TAP");
    vm.wait_for_guest("waiting")?;
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// MiB that are sent in each direction on each CPU.
pub(super) const MIB: u32 = 4;

/// Bytes of the longest Ethernet frame of an MTU of 1500.
const FRAME: u64 = 1514;

/// Much TCP in both directions, one connection for each vCPU, with as many queues; then the TAP goes.
fn bulk(ctx: &Ctx, vhost: &str, cpus: u8) -> Result<(), Failure> {
    let address = format!("{HOST}/24");
    let tap = match cpus {
        1 => Tap::create("pfnet0", &address)?,
        _ => Tap::create_multi_queue("pfnet0", &address)?,
    };
    let mut vm = Machine::new(ctx)
        .vcpus(cpus)
        .net(&tap, &format!("{GUEST}/24"), HOST)
        .set("/network-interfaces/0/vhost", json!(vhost))
        .set("/network-interfaces/0/queues", json!(cpus))
        .steps("net+wait")
        .start()?;
    vm.wait_for_guest("net ok ")?;
    vm.wait_for_guest("waiting")?;
    let queues = vm.ask("queues")?;
    check!(queues == format!("queues {cpus} {cpus}"), "the guest said `{queues}`");
    let workers = scan(vm.pid())?.iter().filter(|thread| thread.role == Role::Vhost).count();
    let expected = if vhost == "on" { usize::from(cpus) } else { 0 };
    check!(workers == expected, "{workers} vhost workers with vhost {vhost} and {cpus} queues");

    let words = words();
    for (order, direction, serve) in [("push", "rx", take as Serve), ("pull", "tx", give as Serve)] {
        let (packets, bytes) = (format!("{direction}_packets"), format!("{direction}_bytes"));
        let before = (tap.count(&packets)?, tap.count(&bytes)?);
        let (port, server) = listen(HOST, cpus, words.clone(), serve)?;
        let line = vm.ask(&format!("{order} {port} {MIB}"))?;
        check!(line == format!("{order}ed on {cpus}"), "the guest said `{line}`");
        server.join().map_err(|_| Failure::new("the server panicked"))??;
        let (packets, bytes) = (tap.count(&packets)? - before.0, tap.count(&bytes)? - before.1);
        println!("{order}: {bytes} bytes in {packets} packets");
        // More than a frame's worth crosses the TAP at once, and is cut by whoever is last. How much more is up to the
        // sender: Linux sends pieces of two segments where an answer takes long, as in a host that is emulated.
        check!(bytes / packets > FRAME, "{order}: {bytes} bytes in {packets} packets");
    }

    check!(vm.ask("run load")? == "load running", "no load");
    tap.delete()?;
    let line = vm.ask("carrier 0")?;
    check!(line == "carrier 0", "the guest said `{line}`");
    check!(vm.errors().matches("its TAP is gone").count() == 1, "not told once: {}", vm.errors());
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// A TAP for one queue cannot have two.
fn one_queue_is_not_two(ctx: &Ctx) -> Result<(), Failure> {
    let tap = Tap::create("pfnet0", &format!("{HOST}/24"))?;
    let mut vm = Machine::new(ctx)
        .net(&tap, &format!("{GUEST}/24"), HOST)
        .set("/network-interfaces/0/queues", json!(2))
        .start()?;
    vm.expect_exit(152)?;
    check!(vm.errors().contains("ip tuntap add pfnet0 mode tap multi_queue"), "{}", vm.errors());
    Ok(())
}

/// What passes a connection: numbers, so that a piece in the wrong place is seen.
pub(super) fn words() -> Vec<u8> {
    (0..MIB << 18).flat_map(u32::to_le_bytes).collect()
}

/// What is done with a connection, given what is to pass it.
pub(super) type Serve = fn(TcpStream, &[u8]) -> Result<(), Failure>;

/// Serves so many connections at an address of the host's, and says on which port.
pub(super) fn listen(
    host: &str,
    count: u8,
    words: Vec<u8>,
    serve: Serve,
) -> Result<(u16, JoinHandle<Result<(), Failure>>), Failure> {
    let listener = TcpListener::bind((host, 0))?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || {
        let connections: Vec<_> = (0..count).map(|_| listener.accept()).collect::<Result<_, _>>()?;
        std::thread::scope(|scope| {
            let all: Vec<_> =
                connections.into_iter().map(|(stream, _)| scope.spawn(|| serve(stream, &words))).collect();
            all.into_iter()
                .try_for_each(|one| one.join().map_err(|_| Failure::new("a connection's thread panicked"))?)
        })
    });
    Ok((port, server))
}

pub(super) fn take(mut stream: TcpStream, expected: &[u8]) -> Result<(), Failure> {
    let mut words = Vec::with_capacity(expected.len());
    stream.read_to_end(&mut words)?;
    check!(words == expected, "{} bytes came, which are not the {} sent", words.len(), expected.len());
    Ok(())
}

pub(super) fn give(mut stream: TcpStream, words: &[u8]) -> Result<(), Failure> {
    stream.write_all(words)?;
    Ok(stream.shutdown(Shutdown::Write)?)
}
