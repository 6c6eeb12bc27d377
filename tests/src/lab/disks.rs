//! File systems and block devices for drives to be on.

use crate::case::Failure;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs it; what it prints.
pub fn run(command: &mut Command) -> Result<String, Failure> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Failure(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// A file system of its own, unmounted on drop.
#[derive(Debug)]
pub struct Mounted {
    /// Where it is.
    pub folder: PathBuf,
    /// Does not wait for who still uses it.
    lazy: bool,
}

impl Mounted {
    /// An ext2 on `device`, made anew.
    pub fn format(device: &Path, folder: &Path) -> Result<Self, Failure> {
        fs::create_dir(folder)?;
        run(Command::new("busybox").arg("mke2fs").arg(device))?;
        run(Command::new("mount").args(["-t", "ext2"]).arg(device).arg(folder))?;
        Ok(Self { folder: folder.to_owned(), lazy: false })
    }

    /// A tmpfs of a `size` such as `4m`. It goes when nobody uses it any more, as the kernel may for a moment.
    pub fn tmpfs(folder: &Path, size: &str) -> Result<Self, Failure> {
        fs::create_dir(folder)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(folder))?;
        Ok(Self { folder: folder.to_owned(), lazy: true })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let option = if self.lazy { &["--lazy"][..] } else { &[] };
        if let Err(failure) = run(Command::new("umount").args(option).arg(&self.folder)) {
            eprintln!("{failure}");
        }
    }
}

/// A loop device, which goes when this is dropped.
#[derive(Debug)]
pub struct LoopDevice {
    /// What it is over.
    pub file: PathBuf,
    /// Its node in /dev.
    pub device: PathBuf,
}

impl LoopDevice {
    /// One over a file.
    pub fn over(file: &Path) -> Result<Self, Failure> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?.trim().into();
        Ok(Self { file: file.to_owned(), device })
    }

    /// Makes the file and the device longer.
    pub fn grow(&self, size: u64) -> Result<(), Failure> {
        File::options().write(true).open(&self.file)?.set_len(size)?;
        run(Command::new("losetup").arg("--set-capacity").arg(&self.device)).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(failure) = run(Command::new("losetup").arg("--detach").arg(&self.device)) {
            eprintln!("{} is still there: {failure}", self.device.display());
        }
    }
}
