//! Compiles the built-in seccomp policy, so that a bad one breaks the build and a launch only loads the result.

#[path = "src/seccomp/policy.rs"]
mod policy;

use std::error::Error;
use std::path::Path;
use std::{env, fs};

use policy::Role;

const POLICY: &str = "../resources/assets/seccomp/x86_64.json";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={POLICY}");
    println!("cargo::rerun-if-changed=src/seccomp/policy.rs");
    let programs =
        policy::compile(&fs::read_to_string(POLICY)?).map_err(|error| format!("{POLICY}: {error}"))?;
    let out = env::var("OUT_DIR")?;
    for (role, program) in Role::ALL.into_iter().zip(programs) {
        fs::write(Path::new(&out).join(format!("seccomp-{}.bpf", role.name())), program)?;
    }
    Ok(())
}
