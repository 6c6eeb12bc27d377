//! The network, by the kernel's vhost and by ourselves.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Machine, Role, Tap, scan};
use serde_json::json;
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "net_userspace",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| pings(ctx, "off"),
    },
    Case { name: "net_vhost", needs: Needs::VM, timeout: Case::TIMEOUT, run: |ctx| pings(ctx, "on") },
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
