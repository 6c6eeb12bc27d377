//! Target `cgroup_files` for cargo-fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::run("cgroup_files", bytes));
