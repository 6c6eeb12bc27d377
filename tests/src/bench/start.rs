//! From exec to the guest, and what the VMM's memory costs then.

use super::clock::{Moment, ns};
use super::figures::FigureId;
use super::footprint::overhead;
use super::guest::Guest;
use super::inside::Sink;
use super::vmm::{Place, SMALL_MIB, Vmm};
use crate::case::Failure;
use crate::check;
use crate::lab::{read, write};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

const TRACING: &str = "/sys/kernel/tracing";

/// Launches `vmm` twice: once only to its guest's first instruction, once to its init.
pub fn measure(vmm: &Vmm, place: &Place, sink: &Sink) -> Result<(), Failure> {
    sink.sample(vmm, FigureId::FirstInstruction, first_instruction(vmm, place)? / 1e6, None);

    let mut guest = Guest::launch(vmm.small(place)?, &place.ctx.scratch)?;
    let (up, _) = guest.wait_for("bench: up")?;
    let interval = up.since(&guest.launched);
    let idle = sink.counting.then(|| interval.idle());
    sink.sample(vmm, FigureId::InitBusy, ns(interval.busy) / 1e6, None);
    sink.sample(vmm, FigureId::InitElapsed, ns(interval.elapsed) / 1e6, idle);
    guest.wait_for("bench: ready")?;
    let memory = overhead(guest.pid(), SMALL_MIB)?;
    sink.sample(vmm, FigureId::OverheadRss, ns(memory.rss), None);
    sink.sample(vmm, FigureId::OverheadPss, ns(memory.pss), None);
    guest.stop()
}

/// From before exec to KVM's first entry into the guest, in ns, by the tracepoint `kvm_entry`.
fn first_instruction(vmm: &Vmm, place: &Place) -> Result<f64, Failure> {
    let folder = Path::new(TRACING);
    if !folder.join("trace_clock").exists() {
        let mounted = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING]).status()?;
        check!(mounted.success(), "cannot mount tracefs at {TRACING}");
    }
    let event = folder.join("events/kvm/kvm_entry/enable");
    write(&folder.join("trace_clock"), "mono")?;
    // Empties the buffer.
    write(&folder.join("trace"), "")?;
    let command = vmm.small(place)?;
    write(&event, "1")?;
    let first = (|| {
        let guest = Guest::launch(command, &place.ctx.scratch)?;
        let mut line = String::new();
        BufReader::new(File::open(folder.join("trace_pipe"))?).read_line(&mut line)?;
        write(&event, "0")?;
        let entered = timestamp(&line).ok_or_else(|| Failure(format!("no time in `{line}`")))?;
        let launched = guest.launched.now;
        guest.stop()?;
        Ok(ns(entered.saturating_sub(launched)))
    })();
    write(&event, "0")?;
    first
}

/// The time in a line of the trace (` fc_vcpu 0-12 [000] d.... 12.345678: kvm_entry: ...`), in ns.
fn timestamp(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(": kvm_entry:")?;
    let (seconds, micros) = before.rsplit(' ').next()?.split_once('.')?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000)
}

/// The exits of all VMs so far (`exits` of KVM's debugfs); only one VM runs at a time.
pub fn exits() -> Result<u64, Failure> {
    Ok(read(Path::new("/sys/kernel/debug/kvm/exits"))?.trim().parse()?)
}

/// Waits for something that has no event of its own to wait for.
pub fn poll(what: &str, mut there: impl FnMut() -> bool) -> Result<(), Failure> {
    let start = Moment::now()?;
    while !there() {
        check!(Moment::now()?.since(&start).elapsed < 20_000_000_000, "{what} did not come");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_trace_line() {
        let line = "       fc_vcpu 0-345     [000] d....    12.000345: kvm_entry: vcpu 0, rip 0x1000000\n";
        assert_eq!(timestamp(line), Some(12_000_345_000));
        assert_eq!(timestamp("# tracer: nop"), None);
    }
}
