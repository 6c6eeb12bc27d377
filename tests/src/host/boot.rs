//! A running emulated host.

use super::channel::{Channel, Silence};
use super::command::{run, tail};
use super::image::{HostImage, host_image};
use super::progress::{Step, say};
use super::{GuestFiles, HostError, cache, cpio, emulator, guest_files, packages};
use crate::agent::{Reply, Request};
use crate::artifacts::Binaries;
use crate::case::{Case, CgroupVersion, Failure};
use crate::route::Kind;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Systemd and the agent are up within 15 s on two idle cores; this is for busy ones.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// After the agent's own time limit for a case: how long its report may take.
const GRACE: Duration = Duration::from_secs(60);
/// Room for the largest guest of the tests (5 GiB), the job, and the host itself.
const MEMORY: &str = "10G";
/// The size of the disk that cases may overwrite, in bytes.
const SCRATCH_SIZE: u64 = 512 << 20;

/// A booted host with its agent. Dropping it ends it.
pub struct EmulatedHost {
    kind: Kind,
    qemu: Child,
    channel: Channel,
    console: PathBuf,
    /// Job, scratch disk and socket; gone with the host.
    _folder: TempDir,
}

impl EmulatedHost {
    /// Builds what is missing, boots a host of `kind`, and waits for its agent.
    ///
    /// To be called from a thread that outlives the host: when that thread ends, the kernel kills QEMU.
    pub fn boot(kind: Kind, binaries: &Binaries) -> Result<Self, HostError> {
        packages::ensure()?;
        let image = host_image(kind.kernel)?;
        let guest = guest_files()?;
        Self::boot_with(kind, &image, Cpu::Quick, |stage| link_job(stage, &guest, binaries))
    }

    /// Boots `image` as a host of `kind` with what `fill` puts into the folder of its job.
    pub fn boot_with(
        kind: Kind,
        image: &HostImage,
        cpu: Cpu,
        fill: impl FnOnce(&Path) -> Result<(), HostError>,
    ) -> Result<Self, HostError> {
        let step = match cpu {
            Cpu::Quick => Step::new(format!("booting the emulated host ({kind})")),
            Cpu::Counting => Step::new(format!("booting the emulated host ({kind}), counting instructions")),
        };
        let folder = tempfile::Builder::new()
            .prefix("pinfold-host-")
            .tempdir()
            .map_err(HostError::file("create", "a temporary folder"))?;
        let job = pack_job(folder.path(), fill)?;
        let scratch = folder.path().join("scratch");
        File::create(&scratch)
            .and_then(|file| file.set_len(SCRATCH_SIZE))
            .map_err(HostError::file("create", &scratch))?;
        let console = folder.path().join("console");
        // QEMU writes into it from the start.
        File::create(&console).map_err(HostError::file("create", &console))?;
        let socket = folder.path().join("agent");
        let (mut qemu, doubt) = match cpu {
            Cpu::Quick => emulator::command()?,
            Cpu::Counting => emulator::counting_command()?,
        };
        if let Some(doubt) = doubt {
            say(doubt);
        }
        cpu.configure(&mut qemu);
        configure(&mut qemu, kind, image, &job, &scratch, &console, &socket);
        let qemu = qemu
            .spawn()
            .map_err(|source| HostError::Spawn { program: "qemu-system-x86_64".to_owned(), source })?;
        let mut qemu = KillOnDrop(Some(qemu));
        let channel = connect(&socket, &mut qemu, &console)?;
        match channel.receive(cpu.boot_timeout()) {
            Ok(Reply::Hello(_)) => {}
            Ok(other) => return Err(dead(&console, &format!("said {other:?} first"))),
            Err(Silence::Timeout) => {
                let what = format!("did not come up in {} s", cpu.boot_timeout().as_secs());
                return Err(dead(&console, &what));
            }
            Err(Silence::Closed) => return Err(dead(&console, "ended while booting")),
        }
        let Some(qemu) = qemu.0.take() else { return Err(dead(&console, "is gone")) };
        drop(step);
        Ok(Self { kind, qemu, channel, console, _folder: folder })
    }

    /// What kind of host this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Runs `case` in the host, handing its output to `out`. An error of the outer kind means that the
    /// host is not usable any more: it ended, or it stands still, which shows when the agent, which ends a case in
    /// time, does not say so.
    pub fn run(&mut self, case: &Case, out: &mut dyn FnMut(&str)) -> Result<Result<(), Failure>, HostError> {
        let request = Request::Run { case: case.name.to_owned(), timeout_s: case.timeout.as_secs() };
        self.channel.send(&request).map_err(|_| dead(&self.console, "does not take requests"))?;
        let mut heard = Instant::now();
        let deadline = heard + case.timeout + GRACE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.channel.receive(left) {
                Ok(Reply::Out(text)) => {
                    heard = Instant::now();
                    out(&text);
                }
                Ok(Reply::Done { ok: true, .. }) => return Ok(Ok(())),
                Ok(Reply::Done { ok: false, detail }) => return Ok(Err(Failure(detail))),
                Ok(Reply::Hello(_)) => return Err(dead(&self.console, "rebooted")),
                Err(Silence::Timeout) => {
                    let silence = heard.elapsed().as_secs();
                    let what = format!("stands still: nothing was heard from it for {silence} s");
                    return Err(dead(&self.console, &what));
                }
                Err(Silence::Closed) => return Err(dead(&self.console, "ended")),
            }
        }
    }

    /// The last `lines` lines of the host's console: kernel messages above all.
    pub fn console_tail(&self, lines: usize) -> String {
        console_tail(&self.console, lines)
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        // Its disks are snapshots and scratch: nothing needs an orderly end.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
        drop(keep_console(&self.console, self.kind));
    }
}

/// Keeps the whole console for those who want to look: in one file those of all hosts of a kind, as they ended.
fn keep_console(console: &Path, kind: Kind) -> Result<(), HostError> {
    static BEGUN: Mutex<BTreeSet<Kind>> = Mutex::new(BTreeSet::new());
    let kept = cache::root()?.join(format!("console-{}.log", label(kind)));
    let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut options = File::options();
    // What an earlier run has left there goes.
    if begun.insert(kind) {
        options.create(true).write(true).truncate(true)
    } else {
        options.append(true)
    };
    let copied = File::open(console).and_then(|mut from| std::io::copy(&mut from, &mut options.open(&kept)?));
    copied.map(drop).map_err(HostError::file("write", kept))
}

/// How the host's CPU is emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpu {
    /// As fast as it goes.
    Quick,
    /// With a clock that counts instructions: 1 ns is one instruction of whatever runs in the host, nested guests
    /// included. When the host is idle the clock jumps to the next timer.
    Counting,
}

impl Cpu {
    fn configure(self, qemu: &mut Command) {
        match self {
            Self::Quick => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm,-la57"]),
            // With these two features a `rep movsb` would count one instruction a byte, and copies swamp all else.
            Self::Counting => qemu
                .args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"])
                .args(["-cpu", "max,+svm,-la57,-erms,-fsrm"]),
        };
    }

    fn boot_timeout(self) -> Duration {
        match self {
            Self::Quick => BOOT_TIMEOUT,
            Self::Counting => 4 * BOOT_TIMEOUT,
        }
    }
}

/// Ends QEMU when booting fails half-way.
struct KillOnDrop(Option<Child>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Puts what cases need into one tar file, which the host sees as a disk.
fn pack_job(folder: &Path, fill: impl FnOnce(&Path) -> Result<(), HostError>) -> Result<PathBuf, HostError> {
    let stage = folder.join("stage");
    fs::create_dir(&stage).map_err(HostError::file("create", &stage))?;
    fill(&stage)?;
    let job = folder.join("job.tar");
    run("packing the job", Command::new("tar").arg("-chf").arg(&job).arg("-C").arg(&stage).arg("."))?;
    Ok(job)
}

/// Makes a job in `folder`: links, and the guest's initramfs with our own binary in it.
pub fn link_job(folder: &Path, guest: &GuestFiles, binaries: &Binaries) -> Result<(), HostError> {
    link_binaries(folder, guest, binaries)?;
    add_guest_binary(&guest.initramfs, binaries, &folder.join("initramfs"))
}

/// Links a job's programs and kernels into `folder`, and writes there how often to repeat what is repeated.
pub fn link_binaries(folder: &Path, guest: &GuestFiles, binaries: &Binaries) -> Result<(), HostError> {
    let repeat = std::env::var("PINFOLD_TEST_REPEAT").unwrap_or_else(|_| "1".to_owned());
    if !repeat.parse().is_ok_and(|number: u16| number > 0) {
        return Err(HostError::Unexpected(format!(
            "PINFOLD_TEST_REPEAT is `{repeat}`: give a number from 1 on"
        )));
    }
    let file = folder.join("repeat");
    fs::write(&file, repeat).map_err(HostError::file("write", file))?;
    for (name, target) in [
        ("pinfold", &binaries.pinfold),
        ("pinfold-suite", &binaries.suite),
        ("pinctl", &binaries.pinctl),
        ("bzImage", &guest.bzimage),
        ("vmlinux", &guest.vmlinux),
    ] {
        std::os::unix::fs::symlink(target, folder.join(name)).map_err(HostError::file("link", target))?;
    }
    Ok(())
}

/// Writes `initramfs` with our own guest binary in it to `to`.
pub fn add_guest_binary(initramfs: &Path, binaries: &Binaries, to: &Path) -> Result<(), HostError> {
    // The kernel unpacks archives one after another.
    let read = |path: &Path| fs::read(path).map_err(HostError::file("read", path));
    let mut archive = cpio::Archive::default();
    archive.file("bin/pinfold-guest", 0o755, &read(&binaries.guest)?);
    let whole = [read(initramfs)?, archive.finish()].concat();
    fs::write(to, whole).map_err(HostError::file("write", to))
}

fn configure(
    qemu: &mut Command,
    kind: Kind,
    image: &HostImage,
    job: &Path,
    scratch: &Path,
    console: &Path,
    socket: &Path,
) {
    let mut arguments = "console=ttyS0 root=/dev/vda rw panic=-1 oops=panic mitigations=off loglevel=5 \
                         cryptomgr.notests systemd.show_status=0"
        .to_owned();
    if kind.cgroup == CgroupVersion::V1 {
        // The second makes it pure v1; the first alone is hybrid.
        arguments += " systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1";
    }
    // One CPU: kernels patch code that is running (static keys in KVM's inner loop), and TCG's threads may run the
    // breakpoint of such a patch after it was taken out. Nested guests hang or reset of it now and then, and
    // sometimes the host dies.
    qemu.args(["-smp", "1", "-m", MEMORY])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", &arguments])
        .arg("-drive")
        .arg(format!("file={},format=raw,if=virtio,snapshot=on", image.disk.display()))
        .arg("-drive")
        .arg(format!("file={},format=raw,if=virtio,readonly=on", job.display()))
        .arg("-drive")
        .arg(format!("file={},format=raw,if=virtio,cache=writeback,discard=unmap", scratch.display()))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-chardev")
        .arg(format!("socket,id=agent,path={},server=on,wait=off", socket.display()))
        .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=pinfold"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // QEMU's own complaints, such as memory that cannot be had, belong to what the user reads.
        .stderr(Stdio::inherit());
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
    unsafe {
        qemu.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
}

/// Connects to QEMU's socket, which appears a moment after it starts.
fn connect(socket: &Path, qemu: &mut KillOnDrop, console: &Path) -> Result<Channel, HostError> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Channel::connect(socket) {
            Ok(channel) => return Ok(channel),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            Err(source) => return Err(HostError::file("connect to", socket)(source)),
        }
        if let Some(child) = &mut qemu.0
            && let Ok(Some(status)) = child.try_wait()
        {
            return Err(dead(console, &format!("did not start: QEMU ended with {status}")));
        }
    }
}

fn dead(console: &Path, what: &str) -> HostError {
    HostError::Dead { what: what.to_owned(), console: console_tail(console, 40) }
}

fn console_tail(console: &Path, lines: usize) -> String {
    let text = fs::read(console).unwrap_or_default();
    tail(&String::from_utf8_lossy(&text).replace('\r', ""), lines)
}

/// A file name's part for `kind`.
fn label(kind: Kind) -> String {
    kind.to_string().replace(", ", "-").replace(' ', "-")
}
