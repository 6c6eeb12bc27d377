//! QEMU as the emulated host runs it.
//!
//! QEMU's emulation of SVM has a fault (seen in 7.2 and 10.0): when VMRUN injects an interrupt into the nested
//! guest (`helper_vmrun`, `SVM_EVTINJ_TYPE_INTR`), it leaves `exception_index` set to the interrupt's vector. If
//! another thread of QEMU kicks the vCPU before the next exit, QEMU delivers that vector a second time: in a
//! nested guest that has interrupts off, which then hangs, or even in the host's kernel, which then dies on its
//! own stack. The interrupt itself is delivered by the call that follows, so the store is of no use. Where the
//! installed QEMU is of a build whose code is known, hosts run a private copy of it without that store.

use super::{HostError, cache, recipe};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program of Debian's package.
const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";

/// `env->error_code = event_inj_err; cs->exception_index = vector; env->exception_is_int = 0;
/// env->exception_next_eip = -1;` as Debian 12 compiles it.
const INJECTION: [&[u8]; 4] = [
    &[0x44, 0x89, 0xab, 0x80, 0x33, 0, 0],
    &[0x89, 0xb3, 0x54, 0xef, 0xff, 0xff],
    &[0xc7, 0x83, 0x84, 0x33, 0, 0, 0, 0, 0, 0],
    &[0x48, 0xc7, 0x83, 0x88, 0x33, 0, 0, 0xff, 0xff, 0xff, 0xff],
];
/// One instruction that does nothing in place of the second.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];

/// QEMU, to be given arguments. With it goes what is known against it, if it runs as installed.
pub fn command() -> Result<(Command, Option<&'static str>), HostError> {
    let original = fs::read(INSTALLED).map_err(HostError::file("read", INSTALLED))?;
    let Some(repaired) = repaired(&original) else {
        return Ok((
            Command::new(INSTALLED),
            Some("this build of QEMU is not known: nested guests may hang now and then"),
        ));
    };
    let digest = recipe::digest(&[&original.len().to_string(), &format!("{:?}", fingerprint(&original))]);
    let folder = cache::get("qemu", &digest, |folder| {
        let path = folder.join("qemu-system-x86_64");
        fs::write(&path, repaired)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .map_err(HostError::file("write", path))
    })?;
    let mut command = Command::new(folder.join("qemu-system-x86_64"));
    // It finds neither by where it is.
    command.env("QEMU_MODULE_DIR", "/usr/lib/x86_64-linux-gnu/qemu");
    for data in ["/usr/share/qemu", "/usr/share/seabios"].iter().filter(|data| Path::new(data).is_dir()) {
        command.args([Path::new("-L"), &PathBuf::from(data)]);
    }
    Ok((command, None))
}

/// QEMU for the host that counts instructions: `PINFOLD_BENCH_QEMU`, or [`command`]'s.
pub fn counting_command() -> Result<(Command, Option<&'static str>), HostError> {
    match std::env::var_os("PINFOLD_BENCH_QEMU") {
        Some(program) => Ok((Command::new(program), None)),
        None => command(),
    }
}

/// `program` without the store; `None` when its code is not there exactly once.
fn repaired(program: &[u8]) -> Option<Vec<u8>> {
    let injection = INJECTION.concat();
    let mut found = program.windows(injection.len()).enumerate().filter(|(_, window)| *window == injection);
    let (at, _) = found.next()?;
    if found.next().is_some() {
        return None;
    }
    let store = at + INJECTION[0].len();
    let mut program = program.to_owned();
    program[store..store + NOTHING.len()].copy_from_slice(&NOTHING);
    Some(program)
}

/// Enough of the program to tell builds apart: its first kilobyte holds the build id.
fn fingerprint(program: &[u8]) -> &[u8] {
    &program[..program.len().min(1024)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_store_is_taken_out_and_only_where_it_is_known() {
        let program = [&[1, 2, 3], &INJECTION.concat()[..], &[4, 5]].concat();
        let repaired = repaired(&program).unwrap();
        assert_eq!(repaired[..10], program[..10]);
        assert_eq!(repaired[10..16], NOTHING);
        assert_eq!(repaired[16..], program[16..]);
        assert_eq!(super::repaired(&repaired), None);
        assert_eq!(super::repaired(&[program.clone(), program].concat()), None);
    }
}
