//! Builds the small guest, a kernel of one file, by the compiler that builds us: `tests/guest/small.rs`.

use std::path::Path;
use std::process::Command;

const SOURCE: &str = "guest/small.rs";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    // Each guest that boots unpacks it: without symbols it is a tenth of the size.
    println!("cargo::rustc-link-arg-bin=pinfold-guest=-Wl,--strip-all");
    let variable = |name| std::env::var(name).unwrap_or_else(|error| panic!("cargo sets {name}: {error}"));
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        "--edition=2024",
        "--target",
        &variable("TARGET"),
        "-Dwarnings",
        "-Copt-level=2",
        "-Cpanic=abort",
    ]);
    // With the whole of `core` at hand only what is used is linked, which needs nothing of a C library.
    rustc.args(["-Clto=fat", "-Crelocation-model=static", "-Ctarget-feature=+crt-static"]);
    rustc.arg("-Clink-args=-nostdlib -nostartfiles -static -no-pie");
    rustc.arg("-o").arg(Path::new(&variable("OUT_DIR")).join("small-guest")).arg(SOURCE);
    let status = rustc.status().unwrap_or_else(|error| panic!("cannot run {rustc:?}: {error}"));
    assert!(status.success(), "{rustc:?} ended with {status}");
}
