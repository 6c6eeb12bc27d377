//! The `pinfold` binary: see the `vmm` crate.

fn main() -> std::process::ExitCode {
    vmm::launch::main()
}
