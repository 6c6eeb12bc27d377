//! SIGKILL at random moments of boot, I/O and shutdown: nothing of the microVM is left, and what its guest has flushed is
//! on the disk.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{
    Machine, Made, Pod, Running, Sectors, Tally, Tap, adopt_orphans, caller, expect_no_children,
};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// The cases of this file.
pub const CASES: &[Case] = &[
    case("faults_sigkill_v2", CgroupVersion::V2, |ctx| kills(ctx, 48)),
    case("faults_sigkill_v1", CgroupVersion::V1, |ctx| kills(ctx, 12)),
];

const fn case(name: &'static str, cgroup: CgroupVersion, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs = Needs { own_host: true, cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(1800), run }
}

/// Rounds of writes and a flush that the disk has room for.
const ROUNDS: u64 = 64;

/// Random numbers that a seed decides (SplitMix64).
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A part of `whole`.
    fn part(&mut self, whole: Duration) -> Duration {
        whole.mul_f64((self.throw() >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

/// What the launches share.
struct Place<'a> {
    ctx: &'a Ctx,
    pod: Pod,
    caller: Made,
    tap: Tap,
    disk: PathBuf,
}

impl Place<'_> {
    /// Launches a guest that fills its disk and then does what `then` says.
    fn launch(&self, then: &str, engine: &str, io_thread: bool) -> Result<Running, Failure> {
        Sectors::make_disk(&self.disk, ROUNDS)?;
        self.machine(then)?
            .drive("data", &self.disk, false)
            .set("/drives/0/cache_type", json!("Writeback"))
            .set("/drives/0/io_engine", json!(engine))
            .set("/drives/0/io_thread", json!(io_thread))
            .net(&self.tap, "172.30.21.2/24", "172.30.21.1")
            .cgroup(json!({ "parent": self.pod.path() }))
            .from_caller(&self.caller)?
            .start_with_api()
    }

    fn machine(&self, then: &str) -> Result<Machine, Failure> {
        Machine::small(self.ctx, &format!("then={then}"))
    }

    /// Nothing is left, and what was flushed is there: how many sectors.
    fn inspect(&self, mut vm: Running) -> Result<u64, Failure> {
        vm.wait_exit()?;
        vm.wait_errors_closed()?;
        let left = self.pod.children()?;
        check!(left.is_empty(), "{left:?} is left below {}: {}", self.pod.path(), vm.errors());
        let told = Sectors::told(&vm.console());
        check!(told.failed == 0, "the guest met I/O errors: {}", vm.console());
        drop(vm);
        expect_no_children()?;
        let socket = self.machine("")?.socket();
        check!(!socket.exists(), "{} is left", socket.display());
        drop(self.tap.hold()?);
        told.check(&self.disk)?;
        Ok(told.flushed)
    }
}

/// When in a microVM's life it is killed.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Boot,
    Io,
    Shutdown,
}

fn kills(ctx: &Ctx, count: usize) -> Result<(), Failure> {
    let place = Place {
        ctx,
        pod: Pod::create("kills")?,
        caller: caller()?,
        tap: Tap::create("pfkill0", "172.30.21.1/24")?,
        disk: ctx.scratch.join("disk"),
    };
    adopt_orphans()?;
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.subsec_nanos();
    let mut dice = Dice(seed.into());
    let count = count * ctx.repeat;

    // A life without a kill says how long each phase takes here.
    let started = Instant::now();
    let vm = place.launch("reset", "Sync", false)?;
    vm.wait_for_line("small: ready")?;
    let boot = started.elapsed();
    vm.wait_for_line("small: end")?;
    let io = started.elapsed().saturating_sub(boot);
    vm.wait_errors_closed()?;
    let shutdown = started.elapsed().saturating_sub(boot + io);
    let flushed = place.inspect(vm)?;
    check!(flushed == 4 * ROUNDS, "only {flushed} sectors were flushed");
    println!("seed {seed}: boot takes {boot:.1?}, I/O {io:.1?}, shutdown {shutdown:.1?}");

    let before = Tally::take()?;
    let started = Instant::now();
    let (mut sectors, mut part_way) = (0, 0);
    for number in 0..count {
        let phase = [Phase::Boot, Phase::Io, Phase::Shutdown][number % 3];
        let (engine, io_thread) = [("Sync", false), ("Async", false), ("Async", true)][number / 3 % 3];
        let flushed =
            kill_once(&place, &mut dice, (phase, [boot, io, shutdown][number % 3]), engine, io_thread)
                .map_err(|failure| Failure(format!("seed {seed}, kill {number} ({phase:?}): {failure}")))?;
        sectors += flushed;
        part_way += u64::from((1..4 * ROUNDS).contains(&flushed));
    }
    println!(
        "{count} kills in {:.1} s: {sectors} flushed sectors are on the disk, {part_way} kills came amid the I/O",
        started.elapsed().as_secs_f64()
    );
    check!(part_way > 0, "no kill came amid the I/O");
    place.launch("reset", "Sync", false).and_then(|vm| place.inspect(vm))?;
    before.expect_restored()
}

fn kill_once(
    place: &Place,
    dice: &mut Dice,
    (phase, whole): (Phase, Duration),
    engine: &str,
    io_thread: bool,
) -> Result<u64, Failure> {
    // A stop by a signal is a shutdown as well.
    let by_signal = dice.throw().is_multiple_of(2);
    let then = if by_signal { "sleep" } else { "reset" };
    let vm = place.launch(then, engine, io_thread)?;
    match phase {
        Phase::Boot => {}
        Phase::Io => drop(vm.wait_for_line("small: ready")?),
        Phase::Shutdown => {
            vm.wait_for_line("small: end")?;
            if by_signal {
                vm.signal(libc::SIGTERM)?;
            }
        }
    }
    std::thread::sleep(dice.part(whole));
    vm.signal(libc::SIGKILL)?;
    place.inspect(vm)
}
