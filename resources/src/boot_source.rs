//! `boot-source`: the kernel, its initrd and its arguments.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An uncompressed `vmlinux` (ELF) or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// Kernel arguments; Firecracker's defaults when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}
