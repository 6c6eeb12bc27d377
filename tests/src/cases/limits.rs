//! Rate limiters: over ten seconds a guest that wants more gets what was declared.

use super::net::{Serve, give, listen, take};
use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, Machine, Running, Tap};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "rate_limits_are_exact",
    needs: Needs { kvm: true, ..Needs::NOTHING },
    timeout: Case::TIMEOUT,
    run: exact,
}];

const HOST: &str = "172.30.3.1";
const GUEST: &str = "172.30.3.2";

/// Bytes and operations a second of the drives, bytes a second of the network.
const BYTES: u64 = 2 << 20;
const OPS: u64 = 100;
const NET: u64 = 512 << 10;

/// How long the use is measured, and how far it may be from the limit, in hundredths. A host that stands still for a
/// moment is off for that window, and made up for in the next one: a limiter that drifts is off in all.
const WINDOW: Duration = Duration::from_secs(10);
const TOLERANCE: f64 = 2.0;
const WINDOWS: u32 = 4;

/// A limit of `rate` a second: of bytes or of operations, in a bucket for a quarter of a second.
fn limit(kind: &str, rate: u64) -> Value {
    json!({ kind: { "size": rate / 4, "refill_time": 250 } })
}

fn exact(ctx: &Ctx) -> Result<(), Failure> {
    let tap = Tap::create("pfnet0", &format!("{HOST}/24"))?;
    let mut machine = Machine::new(ctx);
    for id in ["bytes", "ops"] {
        let path = ctx.scratch.join(id);
        File::create(&path)?.set_len(64 << 20)?;
        machine = machine.drive(id, &path, true);
    }
    let file = ctx.scratch.join("metrics");
    let (mut vm, api) = machine
        .set("/drives/0/rate_limiter", limit("bandwidth", BYTES))
        .set("/drives/1/rate_limiter", limit("ops", OPS))
        .net(&tap, &format!("{GUEST}/24"), HOST)
        .set("/network-interfaces/0/rx_rate_limiter", limit("bandwidth", NET))
        .set("/network-interfaces/0/tx_rate_limiter", limit("bandwidth", NET))
        .set("/metrics", json!({ "metrics_path": file }))
        .steps("net+wait")
        .start_and_connect()?;
    vm.wait_for_guest("waiting")?;
    let mut meters = Meters { api, file };

    for disk in ["vda bs=64k", "vdb bs=4k"] {
        let order = format!("while :; do dd if=/dev/{disk} of=/dev/null iflag=direct; done");
        begin(&mut vm, &order)?;
    }
    // One direction at a time: what TCP sends waits for answers, which would wait for the limit of the other one.
    let sender = Bulk::begin(&mut vm, "push", take)?;
    meters.expect("from the start", [Some(BYTES), Some(OPS), None, Some(NET)])?;
    sender.end(&mut vm)?;

    // Other limits hold from the next request on.
    let half = json!({ "drive_id": "bytes", "rate_limiter": limit("bandwidth", BYTES / 2) });
    meters.api.patch("/drives/bytes", &half)?;
    let twice = json!({ "drive_id": "ops", "rate_limiter": limit("ops", 2 * OPS) });
    meters.api.patch("/drives/ops", &twice)?;
    let twice = json!({ "iface_id": "eth0", "rx_rate_limiter": limit("bandwidth", 2 * NET) });
    meters.api.patch("/network-interfaces/eth0", &twice)?;
    let receiver = Bulk::begin(&mut vm, "pull", give)?;
    meters.expect("after a PATCH", [Some(BYTES / 2), Some(2 * OPS), Some(2 * NET), None])?;
    receiver.end(&mut vm)?;

    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)
}

/// Has the guest do this in the background.
fn begin(vm: &mut Running, order: &str) -> Result<(), Failure> {
    let answer = vm.ask(&format!("do ({order}) >/dev/null 2>&1 & echo begun"))?;
    check!(answer == "did begun", "the guest says `{answer}`");
    Ok(())
}

/// A connection that passes more than any limit here allows in the time that there is.
struct Bulk(JoinHandle<Result<(), Failure>>);

impl Bulk {
    const MIB: usize = 64;

    /// Has the guest `push` or `pull`.
    fn begin(vm: &mut Running, order: &str, serve: Serve) -> Result<Self, Failure> {
        let (port, server) = listen(HOST, 1, vec![0; Self::MIB << 20], serve)?;
        begin(vm, &format!("pinfold-guest {order} {HOST}:{port} {}", Self::MIB))?;
        Ok(Self(server))
    }

    /// It ends before all has passed, so that the server has something to complain of.
    fn end(self, vm: &mut Running) -> Result<(), Failure> {
        let answer = vm.ask("do killall pinfold-guest && echo ended")?;
        check!(answer == "did ended", "the guest says `{answer}`");
        let complaint = self.0.join().map_err(|_| Failure::new("the server panicked"))?;
        check!(complaint.is_err(), "all has passed before the limits were measured");
        Ok(())
    }
}

/// What has passed, by the metrics.
struct Meters {
    api: Api,
    file: PathBuf,
}

impl Meters {
    /// Bytes read from one drive, requests of the other, bytes received and sent.
    const NAMES: [&str; 4] = [
        "/block_bytes/read_bytes",
        "/block_ops/read_count",
        "/net_eth0/rx_bytes_count",
        "/net_eth0/tx_bytes_count",
    ];

    /// Checks that in [`WINDOW`], once the buckets are empty, as much passes as these rates say.
    fn expect(&mut self, when: &str, rates: [Option<u64>; 4]) -> Result<(), Failure> {
        // The buckets are for a quarter of a second.
        std::thread::sleep(Duration::from_secs(2));
        let (mut begun, mut before) = self.read()?;
        for _ in 0..WINDOWS {
            std::thread::sleep(WINDOW);
            let (ended, after) = self.read()?;
            let seconds = ended.duration_since(begun).as_secs_f64();
            let mut within = true;
            for ((name, rate), (before, after)) in Self::NAMES.iter().zip(rates).zip(before.iter().zip(after))
            {
                let Some(rate) = rate else { continue };
                let passed = (after - before) as f64;
                let of_limit = 100.0 * passed / (rate as f64 * seconds);
                println!("{when}: {name} {passed} in {seconds:.3} s, {of_limit:.2} % of the limit");
                within &= (of_limit - 100.0).abs() <= TOLERANCE;
            }
            if within {
                return Ok(());
            }
            (begun, before) = (ended, after);
        }
        Err(Failure(format!("{when}: no window within {TOLERANCE} % of the limits")))
    }

    /// What has passed up to now.
    fn read(&mut self) -> Result<(Instant, [u64; 4]), Failure> {
        let now = Instant::now();
        self.api.put("/actions", &json!({ "action_type": "FlushMetrics" }))?;
        let lines = fs::read_to_string(&self.file)?;
        let mut passed = [0; 4];
        // Each line has what was added since the one before.
        for line in lines.lines() {
            let line: Value = serde_json::from_str(line)?;
            for (sum, name) in passed.iter_mut().zip(Self::NAMES) {
                *sum += line.pointer(name).and_then(Value::as_u64).unwrap_or(0);
            }
        }
        Ok((now, passed))
    }
}
