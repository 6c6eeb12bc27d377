//! What cargo builds for the tests: the binaries, and where.

use crate::host::HostError;
use crate::host::progress::Step;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The binaries that cases run.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The VMM.
    pub pinfold: PathBuf,
    /// The runner of cases and agent of the host.
    pub suite: PathBuf,
    /// What guests run beside busybox.
    pub guest: PathBuf,
    /// The API's client.
    pub pinctl: PathBuf,
}

/// Cargo's target folder.
pub fn target_dir() -> Result<&'static Path, HostError> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let output = cargo(&["metadata", "--no-deps", "--format-version", "1"])?;
    let metadata: serde_json::Value = serde_json::from_str(&output)
        .map_err(|error| HostError::Unexpected(format!("cargo metadata printed no JSON: {error}")))?;
    let target = metadata["target_directory"]
        .as_str()
        .ok_or_else(|| HostError::Unexpected("cargo metadata names no target folder".to_owned()))?;
    Ok(FOUND.get_or_init(|| PathBuf::from(target)))
}

/// Builds the binaries in the profile that we were built in. `PINFOLD_BINARY` names another `pinfold` to
/// test, which must be static as the emulated host has its own C library.
pub fn binaries() -> Result<Binaries, HostError> {
    let _step = Step::new("building pinfold and what tests it");
    let mut arguments = vec!["build", "--message-format=json-render-diagnostics"];
    arguments.extend(["--bin=pinfold-suite", "--bin=pinfold-guest", "--bin=pinctl"]);
    if !cfg!(debug_assertions) {
        arguments.push("--release");
    }
    let given = std::env::var_os("PINFOLD_BINARY").map(PathBuf::from);
    match given {
        // The same features as `cargo test --workspace` builds with, so that nothing is compiled twice.
        None => arguments.extend(["--workspace", "--bin=pinfold"]),
        Some(_) => arguments.extend(["--package", "tests", "--package", "api_server"]),
    }
    let output = cargo(&arguments)?;
    let executable = |name: &str| {
        output
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == name)
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .ok_or_else(|| HostError::Unexpected(format!("cargo built no binary {name}")))
    };
    let pinfold = given.map_or_else(|| executable("pinfold"), Ok)?;
    Ok(Binaries {
        pinfold,
        suite: executable("pinfold-suite")?,
        guest: executable("pinfold-guest")?,
        pinctl: executable("pinctl")?,
    })
}

/// Runs cargo in the workspace. Its messages for people go where ours go.
fn cargo(arguments: &[&str]) -> Result<String, HostError> {
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(&program)
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| HostError::Spawn { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(HostError::Unexpected(format!("cargo {} failed: see its messages above", arguments.join(" "))))
}
