//! Guests of several sizes boot from both forms of a kernel, and both of their endings are ours.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::Machine;
use std::path::Path;
use std::time::Duration;

const NEEDS: Needs = Needs { kvm: true, ..Needs::NOTHING };

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "boots_1_vcpu",
        needs: NEEDS,
        timeout: Duration::from_secs(600),
        run: |ctx| {
            boot(ctx, &ctx.vmlinux, 1, 128, POWEROFF)?;
            boot(ctx, &ctx.bzimage, 1, 128, REBOOT)
        },
    },
    Case {
        name: "boots_2_vcpus",
        needs: NEEDS,
        timeout: Duration::from_secs(600),
        run: |ctx| {
            boot(ctx, &ctx.vmlinux, 2, 256, REBOOT)?;
            boot(ctx, &ctx.bzimage, 2, 256, POWEROFF)
        },
    },
    Case {
        name: "boots_8_vcpus",
        needs: NEEDS,
        timeout: Duration::from_secs(600),
        // More memory than fits below the 32-bit hole.
        run: |ctx| boot(ctx, &ctx.vmlinux, 8, 5120, POWEROFF),
    },
];

/// An order to the guest's init, and the kernel's last word when it takes that way and no other.
type Ending = (&'static str, &'static str);

/// By the sleep registers of ACPI.
const POWEROFF: Ending = ("poweroff", "reboot: Power down");
/// By the keyboard controller (`reboot=k`).
const REBOOT: Ending = ("reboot", "reboot: Restarting system");

fn boot(ctx: &Ctx, kernel: &Path, vcpus: u8, mem_mib: u64, ending: Ending) -> Result<(), Failure> {
    let (order, last_word) = ending;
    println!("{vcpus} vCPUs, {mem_mib} MiB, {}, {order}", kernel.display());
    let mut vm = Machine::new(ctx)
        .kernel(kernel)
        .vcpus(vcpus)
        .mem_mib(mem_mib)
        .with_self_tests()
        .steps(&format!("hello+{order}"))
        .start()?;
    let line = vm.wait_for_guest("up ")?;
    check!(line.starts_with(&format!("up cpus={vcpus} ")), "{vcpus} vCPUs, but the guest says `{line}`");
    let seen: u64 = line
        .rsplit_once("mem_kib=")
        .and_then(|(_, number)| number.parse().ok())
        .ok_or_else(|| Failure(format!("the guest says `{line}`")))?;
    // The kernel keeps some for itself: its image, and 16 bytes of each KiB for the table of pages.
    let given = mem_mib * 1024;
    check!((given / 2..=given).contains(&seen), "{given} KiB given, but the guest says `{line}`");
    vm.wait_for_line(last_word)?;
    vm.expect_exit(0)
}
