//! The kernel command line.

use linux_loader::cmdline::{Cmdline, Error as LoaderError};

use crate::layout::{CMDLINE, MmioDevice};

#[cfg(test)]
mod tests;

/// Arguments of a guest that names none: Firecracker's, so that the same guests behave the same.
pub const DEFAULT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                i8042.dumbkbd swiotlb=noforce";

/// Longest command line in bytes with its NUL: what x86 Linux takes (COMMAND_LINE_SIZE).
pub const MAX_SIZE: usize = 2048;
const _: () = assert!(CMDLINE.size == MAX_SIZE as u64, "the command line's place in memory is its longest");

/// What separates the kernel's arguments from init's.
const INIT_ARGS: &str = " -- ";

/// The drive that holds the root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootDrive<'a> {
    /// The partition to mount, by its unique id; without one it is the whole first disk, `/dev/vda`.
    pub partuuid: Option<&'a str>,
    /// Mounted read-only (`ro`), else `rw`.
    pub read_only: bool,
}

/// Why a command line cannot be passed to the guest.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// It holds a NUL byte.
    #[error("the kernel arguments hold a NUL at byte {at}: remove it")]
    Nul {
        /// Byte offset.
        at: usize,
    },
    /// It holds something else than printable ASCII.
    #[error("the kernel arguments hold {found:?} at byte {at}: only printable ASCII can be passed")]
    NotAscii {
        /// The character.
        found: char,
        /// Byte offset.
        at: usize,
    },
    /// The arguments alone are too long.
    #[error("the kernel arguments have {len} characters; at most {} can be passed", MAX_SIZE - 1)]
    ArgumentsTooLong {
        /// Characters given.
        len: usize,
    },
    /// It got too long.
    #[error(
        "the kernel command line is too long: with the arguments added for {adding} it has more than {} \
         characters",
        MAX_SIZE - 1
    )]
    TooLong {
        /// What was being added.
        adding: &'static str,
    },
    /// Anything else the builder refuses.
    #[error("cannot build the kernel command line from the arguments given")]
    Refused(#[source] LoaderError),
}

/// Builds the command line for a guest with these virtio-mmio devices, or with PCI when there are `None`: the given
/// arguments (else [`DEFAULT_ARGS`]), then, without PCI, `pci=off` unless they say something about `pci=` (there is
/// none to look for; Firecracker does the same), then where the root file system is, then, only if the arguments
/// hold the word `acpi=off`, a `virtio_mmio.device=` for each device (Linux
/// Documentation/admin-guide/kernel-parameters.txt). What follows ` -- ` is for init and stays at the end.
///
/// # Errors
/// See [`CmdlineError`].
pub fn build(
    args: Option<&str>,
    root: Option<RootDrive<'_>>,
    virtio_mmio: Option<&[MmioDevice]>,
) -> Result<Cmdline, CmdlineError> {
    let args = args.unwrap_or(DEFAULT_ARGS);
    check_characters(args)?;
    // Its capacity error says nothing about which arguments, so the length is checked here first.
    if args.trim().len() >= MAX_SIZE {
        return Err(CmdlineError::ArgumentsTooLong { len: args.trim().len() });
    }
    let mut line = Cmdline::try_from(args, MAX_SIZE).map_err(CmdlineError::Refused)?;
    if virtio_mmio.is_some() && !kernel_words(args).any(|word| word.starts_with("pci=")) {
        line.insert_str("pci=off").map_err(too_long("PCI"))?;
    }
    if let Some(root) = root {
        let place = root.partuuid.map_or("root=/dev/vda".to_owned(), |id| format!("root=PARTUUID={id}"));
        check_characters(&place)?;
        let mode = if root.read_only { "ro" } else { "rw" };
        line.insert_str(format!("{place} {mode}")).map_err(too_long("the root drive"))?;
    }
    if kernel_words(args).any(|word| word == "acpi=off") {
        for device in virtio_mmio.unwrap_or_default() {
            line.add_virtio_mmio_device(device.size, device.base, device.gsi, None)
                .map_err(too_long("virtio-mmio devices"))?;
        }
    }
    // Arguments for init alone cannot be written down.
    line.as_cstring().map_err(CmdlineError::Refused)?;
    Ok(line)
}

/// Whether arguments keep the kernel from looking at PCI at all.
pub fn hides_pci(args: &str) -> bool {
    kernel_words(args)
        .filter_map(|word| word.strip_prefix("pci="))
        .any(|pci| pci.split(',').any(|one| one == "off"))
}

fn too_long(adding: &'static str) -> impl Fn(LoaderError) -> CmdlineError {
    move |error| match error {
        LoaderError::TooLarge => CmdlineError::TooLong { adding },
        other => CmdlineError::Refused(other),
    }
}

fn check_characters(args: &str) -> Result<(), CmdlineError> {
    match args.char_indices().find(|(_, c)| !matches!(c, ' '..='~')) {
        None => Ok(()),
        Some((at, '\0')) => Err(CmdlineError::Nul { at }),
        Some((at, found)) => Err(CmdlineError::NotAscii { found, at }),
    }
}

/// The arguments for the kernel itself.
fn kernel_words(args: &str) -> impl Iterator<Item = &str> {
    args.split_once(INIT_ARGS).map_or(args, |(kernel, _)| kernel).split(' ')
}
