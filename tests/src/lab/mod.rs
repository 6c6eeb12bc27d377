//! What cases are written with: a VM under test, the cgroups and TAPs around it, and a scanner that says
//! where each of its threads is. Nothing here uses product code: it is what the product is measured by.

mod api;
mod cgroups;
mod clock;
mod disks;
mod fifo;
mod leaks;
mod machine;
mod openapi;
mod sectors;
mod tap;
mod threads;
mod tree;

pub use api::{Api, Response, request};
pub use cgroups::{Group, Made, Pod, Unit, caller};
pub use clock::Clock;
pub use disks::{LoopDevice, Mounted, run};
pub use fifo::{Fifo, make_fifo};
pub use leaks::{Tally, adopt_orphans, expect_no_children};
pub use machine::{Machine, Running, containers_of_record};
pub use openapi::get_as_documented;
pub use sectors::Sectors;
pub use tap::Tap;
pub use threads::{Role, Thread, scan, strays};
pub use tree::render;

use crate::case::Failure;
use std::path::Path;
use std::time::Duration;

/// How long a guest may take for one thing. Nested emulation is some 20 times slower than hardware.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Reads a small text file, naming it in the error.
pub fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure(format!("cannot read {}: {error}", path.display())))
}

/// Writes a small text file in one go, naming it in the error.
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text)
        .map_err(|error| Failure(format!("cannot write `{text}` to {}: {error}", path.display())))
}
