//! Fuzz targets: what strangers can send, as plain functions of bytes.
//!
//! A target takes any bytes and returns; what it must not do is panic, hang or touch memory that is not its own.
//! The same functions are run over the corpus and mutations of it by `cargo test` (`tests/corpus.rs`), and with
//! guidance by coverage by cargo-fuzz (`fuzz_targets`).
//!
//! | module | what it is |
//! | --- | --- |
//! | [`targets`] | the targets, one file each |
//! | [`guest`] | the hostile driver that the targets of virtio devices share |
//! | [`transport`] | its way to registers |
//! | [`input`] | the fuzzer's bytes as numbers |
//! | [`host`] | what targets need of the host |
//! | [`mutate`] | inputs from other inputs, without guidance |

pub mod guest;
pub mod host;
pub mod input;
pub mod mutate;
pub mod targets;
pub mod transport;

/// Something that takes bytes from strangers.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which its folder in the corpus has, too.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Inputs that `cargo test` makes of its corpus: as many as take about a third of a second.
    pub mutations: u32,
    /// What the virtio device has to have counted after its corpus.
    pub reaches: &'static [&'static str],
}

/// Of a drive.
const BLOCK: &[&str] = &[
    "read_count",
    "write_count",
    "flush_count",
    "discard_count",
    "execute_fails",
    "invalid_reqs_count",
    "event_fails",
    "rate_limiter_throttled_events",
    "update_count",
];

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "http", run: targets::http::run, mutations: 1000, reaches: &[] },
    Target { name: "api_json", run: targets::api_json::run, mutations: 3000, reaches: &[] },
    Target { name: "config_file", run: targets::config_file::run, mutations: 3000, reaches: &[] },
    Target { name: "oci_spec", run: targets::oci_spec::run, mutations: 3000, reaches: &[] },
    Target { name: "cgroup_files", run: targets::cgroup_files::run, mutations: 500, reaches: &[] },
    Target { name: "kernel", run: targets::kernel::run, mutations: 1000, reaches: &[] },
    Target { name: "platform", run: targets::platform::run, mutations: 1000, reaches: &[] },
    Target { name: "block", run: targets::block::run, mutations: 200, reaches: BLOCK },
    Target { name: "block_uring", run: targets::block_uring::run, mutations: 100, reaches: BLOCK },
    Target {
        name: "net",
        run: targets::net::run,
        mutations: 500,
        reaches: &[
            "tx_packets_count",
            "rx_packets_count",
            "tx_rate_limiter_throttled",
            "rx_rate_limiter_throttled",
        ],
    },
    Target {
        name: "vsock",
        run: targets::vsock::run,
        mutations: 500,
        reaches: &[
            "conns_added",
            "conns_removed",
            "conns_refused",
            "rx_bytes_count",
            "tx_bytes_count",
            "tx_malformed_packets",
        ],
    },
    Target {
        name: "entropy",
        run: targets::entropy::run,
        mutations: 500,
        reaches: &["entropy_bytes", "entropy_event_fails", "entropy_rate_limiter_throttled"],
    },
    Target {
        name: "balloon",
        run: targets::balloon::run,
        mutations: 500,
        reaches: &[
            "inflate_count",
            "deflate_count",
            "stats_updates_count",
            "free_page_report_count",
            "discarded_bytes",
        ],
    },
    Target {
        name: "vhost_user",
        run: targets::vhost_user::run,
        mutations: 200,
        reaches: &["backend_lost", "refused_count"],
    },
    Target { name: "pci", run: targets::pci::run, mutations: 1000, reaches: &[] },
    Target { name: "legacy", run: targets::legacy::run, mutations: 1000, reaches: &[] },
    Target { name: "mmds", run: targets::mmds::run, mutations: 2000, reaches: &[] },
];

/// Runs the target of this name; for cargo-fuzz, whose programs are called like their targets.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a program for each target");
    (target.run)(bytes);
}
