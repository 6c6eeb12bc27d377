//! Which version this is, in the words that clients understand.

/// The version of Firecracker whose API and command line this speaks.
pub const FIRECRACKER: &str = "1.17.0";

/// Our own version.
pub const PINFOLD: &str = env!("CARGO_PKG_VERSION");

/// What `--version` prints. Clients of Firecracker's read the second word.
pub fn line() -> String {
    format!("Firecracker v{FIRECRACKER} (Pinfold {PINFOLD})")
}

/// What `pinfold jail --version` prints after its name: the same.
pub const JAILER: &str = concat!("v1.17.0 (Pinfold ", env!("CARGO_PKG_VERSION"), ")");
