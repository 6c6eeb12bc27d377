//! Many launches, one after another and side by side, leave nothing behind.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, Machine, Pod, Sectors, Tally, Tap, adopt_orphans, caller, expect_no_children};
use serde_json::json;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "launches_one_after_another",
        needs: Needs { own_host: true, cgroup: Some(CgroupVersion::V2), ..Needs::VM },
        timeout: Duration::from_secs(1800),
        run: |ctx| one_after_another(ctx, 40 * ctx.repeat),
    },
    Case {
        name: "launches_side_by_side",
        needs: Needs { own_host: true, cgroup: Some(CgroupVersion::V2), ..Needs::VM },
        timeout: Duration::from_secs(1800),
        run: |ctx| side_by_side(ctx, 24),
    },
];

/// Small guests that do some I/O and reset, with an API every second time.
fn one_after_another(ctx: &Ctx, count: usize) -> Result<(), Failure> {
    const ROUNDS: u64 = 3;
    let pod = Pod::create("launches")?;
    let caller = caller()?;
    let tap = Tap::create("pfmany0", "172.30.20.1/24")?;
    let disk = ctx.scratch.join("disk");
    adopt_orphans()?;
    let launch = |number: usize| {
        Sectors::make_disk(&disk, ROUNDS)?;
        let machine = Machine::small(ctx, "then=reset")?
            .drive("data", &disk, false)
            .set("/drives/0/cache_type", json!("Writeback"))
            .set("/drives/0/io_engine", json!(["Sync", "Async"][number / 2 % 2]))
            .net(&tap, "172.30.20.2/24", "172.30.20.1")
            .cgroup(json!({ "parent": pod.path() }))
            .from_caller(&caller)?;
        let mut vm = if number.is_multiple_of(2) { machine.start()? } else { machine.start_with_api()? };
        vm.expect_exit(0)?;
        vm.wait_errors_closed()?;
        check!(vm.errors().is_empty(), "it says: {}", vm.errors());
        let told = Sectors::told(&vm.console());
        check!(told == Sectors { flushed: 4 * ROUNDS, failed: 0 }, "{told:?}: {}", vm.console());
        drop(vm);
        told.check(&disk)?;
        let left = pod.children()?;
        check!(left.is_empty(), "{left:?} is left below {}", pod.path());
        expect_no_children()
    };
    // What the first launches make is made once: modules' caches, the memory of this process.
    (0..4).try_for_each(launch)?;
    let before = Tally::take()?;
    let started = Instant::now();
    for number in 0..count {
        launch(number).map_err(|failure| Failure(format!("launch {number}: {failure}")))?;
    }
    println!("{count} launches in {:.1} s", started.elapsed().as_secs_f64());
    before.expect_restored()
}

/// Small guests that all live at the same time, each in a pod of its own, and are then stopped or killed.
fn side_by_side(ctx: &Ctx, count: usize) -> Result<(), Failure> {
    const ROUNDS: u64 = 5;
    let caller = caller()?;
    adopt_orphans()?;
    let together = |count: usize| {
        let mut all = Vec::new();
        for number in 0..count {
            let pod = Pod::create(&format!("beside{number}"))?;
            let disk = ctx.scratch.join(format!("disk{number}"));
            Sectors::make_disk(&disk, ROUNDS)?;
            let machine = Machine::small(ctx, "then=sleep")?
                .named(&format!("vm{number}"))?
                .drive("data", &disk, false)
                .set("/drives/0/cache_type", json!("Writeback"))
                .set("/drives/0/io_engine", json!(["Sync", "Async"][number % 2]))
                .set("/drives/0/io_thread", json!(number % 3 == 0))
                .cgroup(json!({ "parent": pod.path() }))
                .from_caller(&caller)?;
            let socket = machine.socket();
            all.push((machine.start_with_api()?, socket, disk, pod));
        }
        for (vm, socket, _, _) in &all {
            vm.wait_for_line("small: end")?;
            let threads = Api::connect(socket)?.get("/cgroup/threads")?;
            check!(threads["strays"] == json!([]), "{threads}");
        }
        for (number, (vm, ..)) in all.iter().enumerate() {
            vm.signal([libc::SIGTERM, libc::SIGKILL][number % 2])?;
        }
        for (mut vm, socket, disk, pod) in all {
            vm.wait_exit()?;
            vm.wait_errors_closed()?;
            check!(vm.errors().is_empty(), "it says: {}", vm.errors());
            let told = Sectors::told(&vm.console());
            check!(told == Sectors { flushed: 4 * ROUNDS, failed: 0 }, "{told:?}: {}", vm.console());
            told.check(&disk)?;
            let left = pod.children()?;
            check!(left.is_empty(), "{left:?} is left below {}", pod.path());
            check!(!socket.exists(), "{} is left", socket.display());
        }
        expect_no_children()
    };
    together(2)?;
    let before = Tally::take()?;
    let started = Instant::now();
    together(count)?;
    println!("{count} launches side by side in {:.1} s", started.elapsed().as_secs_f64());
    before.expect_restored()
}
