//! Disks: what the guest reads is what is in the file, and what it has flushed is on the disk.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::Machine;
use serde_json::json;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "blk_reads_and_writes",
    needs: Needs { kvm: true, scratch_disk: true, ..Needs::NOTHING },
    timeout: Case::TIMEOUT,
    run: reads_and_writes,
}];

/// What the guest's step `write` repeats, and how much of it it writes.
const PATTERN: &[u8] = b"pinfold\n";
const WRITTEN: usize = 1 << 20;

fn reads_and_writes(ctx: &Ctx) -> Result<(), Failure> {
    let device = ctx.scratch_disk.as_ref().ok_or_else(|| Failure::new("no scratch disk"))?;
    let disk = Mounted::format(device, &ctx.scratch.join("mnt"))?;
    let read_only = ctx.scratch.join("read-only.img");
    fs::write(&read_only, noise(3 << 20))?;
    let data = disk.folder.join("data.img");
    File::create(&data)?.set_len(8 << 20)?;
    run(&mut Command::new("sync"))?;

    let mut vm = Machine::new(ctx)
        .drive("code", &read_only, true)
        .drive("data", &data, false)
        .set("/drives/1/cache_type", json!("Writeback"))
        .steps("blk+wait")
        .start()?;
    let expected =
        format!("blk vda bytes={} ro=1 sha256={}", read_only.metadata()?.len(), sha256(&read_only)?);
    let line = vm.wait_for_guest("blk vda ")?;
    check!(line == expected, "the guest read `{line}`, not `{expected}`");
    let line = vm.wait_for_guest("blk vdb ")?;
    check!(line.starts_with("blk vdb bytes=8388608 ro=0 "), "the guest found `{line}`");
    vm.wait_for_guest("waiting")?;

    let before = flushes(device)?;
    vm.send_line("run write")?;
    // Success or failure, whichever is said.
    let line = vm.wait_for_guest("write ")?;
    let after = flushes(device)?;
    println!("flushes of {}: {before} before the guest's fsync, {after} after it", device.display());
    check!(line.starts_with("write vdb done bytes=1048576 "), "the guest said `{line}`");
    // The ext2 on the disk has no journal: nobody but the guest asked for a flush meanwhile.
    check!(after > before, "the guest's fsync did not reach the disk");
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;

    let mut found = vec![0; WRITTEN];
    File::open(&data)?.read_exact(&mut found)?;
    check!(found.chunks(PATTERN.len()).all(|chunk| chunk == PATTERN), "the file holds something else");
    check!(fs::read(&read_only)? == noise(3 << 20), "the read-only disk's file has changed");
    Ok(())
}

/// Bytes without a pattern that a mistake in addressing could hide in.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        // The multiplier of PCG; the upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn sha256(file: &Path) -> Result<String, Failure> {
    let output = run(Command::new("sha256sum").arg(file))?;
    Ok(output.split(' ').next().unwrap_or_default().to_owned())
}

/// How many flushes the block device has completed: field 16 of its `stat` (Documentation/block/stat.rst).
fn flushes(device: &Path) -> Result<u64, Failure> {
    let name = device.file_name().ok_or_else(|| Failure::new("the scratch disk has no name"))?;
    let stat = crate::lab::read(&Path::new("/sys/block").join(name).join("stat"))?;
    let field = stat.split_whitespace().nth(15).and_then(|number| number.parse().ok());
    field.ok_or_else(|| Failure(format!("no count of flushes in `{stat}`")))
}

/// A file system of its own on a block device, unmounted on drop.
struct Mounted {
    folder: PathBuf,
}

impl Mounted {
    fn format(device: &Path, folder: &Path) -> Result<Self, Failure> {
        fs::create_dir(folder)?;
        run(Command::new("busybox").arg("mke2fs").arg(device))?;
        run(Command::new("mount").args(["-t", "ext2"]).arg(device).arg(folder))?;
        Ok(Self { folder: folder.to_owned() })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(failure) = run(Command::new("umount").arg(&self.folder)) {
            eprintln!("{failure}");
        }
    }
}

fn run(command: &mut Command) -> Result<String, Failure> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Failure(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
