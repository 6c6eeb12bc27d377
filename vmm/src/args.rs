//! The command line: Firecracker's, and `--cgroup`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;
use log::LevelFilter;
use resources::InstanceId;

use crate::exit::{Code, Failure};
use crate::version;

/// Bytes of a request's body that the API takes by default.
const PAYLOAD: usize = 51200;

/// What tells more about the command line.
const HELP: &str = "pinfold --help";

/// A micro-VMM that keeps each of its threads in the cgroup that the pod pays for.
///
/// It speaks Firecracker's API and command line.
#[derive(Debug, Parser)]
#[command(name = "pinfold", disable_version_flag = true, max_term_width = 100)]
#[command(after_help = "pinfold jail --help tells how to run it in a jail.")]
pub struct Args {
    /// Unix socket of the API
    #[arg(long, default_value = "/run/firecracker.socket", value_name = "SOCKET")]
    pub api_sock: PathBuf,

    /// JSON file that describes the microVM, which is started at once: Firecracker's format with the section
    /// "cgroup"
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,

    /// Start what the configuration file says, without an API socket
    #[arg(long, requires = "config_file")]
    pub no_api: bool,

    /// The section "cgroup" (where the threads live, and their limits), as JSON text or a file with it; not
    /// together with a configuration file
    #[arg(long, value_name = "JSON|FILE", conflicts_with = "config_file")]
    pub cgroup: Option<String>,

    /// Name of the microVM: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = "anonymous-instance", value_name = "ID")]
    pub id: InstanceId,

    /// JSON file with the metadata that the guest can ask for
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,

    /// File or FIFO for the log, instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,

    /// From which severity on lines are logged: Off, Error, Warn, Info, Debug or Trace; Warn by default on
    /// standard error, Info in a file
    #[arg(long, value_parser = level, value_name = "LEVEL")]
    pub level: Option<LevelFilter>,

    /// Log only what comes from modules of this name
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,

    /// Name the severity in each line of the log
    #[arg(long)]
    pub show_level: bool,

    /// Name the place in the source in each line of the log
    #[arg(long)]
    pub show_log_origin: bool,

    /// File or FIFO for the metrics
    #[arg(long, value_name = "FILE")]
    pub metrics_path: Option<PathBuf>,

    /// File or FIFO for a report at the end, however it comes, kills included: exit code or signal, whether it
    /// was a kill for memory, peak memory and CPU time as a line of JSON; not with the driver "none"
    #[arg(long, value_name = "FILE")]
    pub exit_report: Option<PathBuf>,

    /// Largest body of a request to the API, in bytes
    #[arg(long, default_value_t = PAYLOAD, value_name = "BYTES")]
    pub http_api_max_payload_size: usize,

    /// Largest size of the metadata, in bytes; the API's by default
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,

    /// Give the guest a register with which it says that it has booted; the time is logged
    #[arg(long)]
    pub boot_timer: bool,

    /// When the process was started, in microseconds of the monotonic clock; for the metrics
    #[arg(long, value_name = "US")]
    pub start_time_us: Option<u64>,

    /// CPU time of the process at its start, in microseconds; for the metrics
    #[arg(long, value_name = "US")]
    pub start_time_cpu_us: Option<u64>,

    /// CPU time of the process that started this one, in microseconds; for the metrics
    #[arg(long, value_name = "US")]
    pub parent_cpu_time_us: Option<u64>,

    /// Let threads make every system call; by default each has a seccomp filter
    #[arg(long, conflicts_with = "seccomp_filter")]
    pub no_seccomp: bool,

    /// JSON file with a seccomp policy in place of the built-in one: a filter for each of the roles main, api, vcpu, io
    /// and reaper
    #[arg(long, value_name = "FILE")]
    pub seccomp_filter: Option<PathBuf>,

    /// Put devices on PCI, as "pci" of the machine configuration does, instead of virtio-mmio
    #[arg(long)]
    pub enable_pci: bool,

    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,

    /// Print the version of snapshots; not supported yet
    #[arg(long)]
    pub snapshot_version: bool,

    /// Print the version of a snapshot; not supported yet
    #[arg(long, value_name = "FILE")]
    pub describe_snapshot: Option<PathBuf>,

    /// Internal: the descriptor that a process left to itself before it executed itself anew
    #[arg(long, hide = true)]
    pub handover: Option<RawFd>,

    /// Internal: the descriptor that says what this process is to remove
    #[arg(long, hide = true)]
    pub reap: Option<RawFd>,
}

fn level(text: &str) -> Result<LevelFilter, &'static str> {
    let text = if text.eq_ignore_ascii_case("warning") { "warn" } else { text };
    text.parse().map_err(|_| "say Off, Error, Warn, Info, Debug or Trace")
}

impl Args {
    /// Reads the command line; prints help or version and returns `None` where that is what was asked for.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, Failure> {
        let Some(args) = parse::<Self>(arguments, HELP)? else { return Ok(None) };
        if args.version {
            let _ = writeln!(io::stdout(), "{}", version::line());
            return Ok(None);
        }
        match args.not_yet() {
            Some(why) => Err(refused(why, HELP)),
            None => Ok(Some(args)),
        }
    }

    /// A flag of Firecracker's that this version cannot honour.
    fn not_yet(&self) -> Option<&'static str> {
        if self.snapshot_version || self.describe_snapshot.is_some() {
            return Some("--snapshot-version and --describe-snapshot: snapshots are not supported yet");
        }
        None
    }

    /// The largest size of the metadata, in bytes.
    pub fn mmds_limit(&self) -> usize {
        self.mmds_size_limit.unwrap_or(self.http_api_max_payload_size)
    }
}

/// Reads a command line; prints help or version and returns `None` where that is what was asked for. A refusal says that
/// `help` tells more.
pub fn parse<T: Parser>(
    arguments: impl IntoIterator<Item = OsString>,
    help: &str,
) -> Result<Option<T>, Failure> {
    match T::try_parse_from(arguments) {
        Ok(args) => Ok(Some(args)),
        Err(error) if !error.use_stderr() => {
            // A closed standard output is no reason to fail.
            let _ = error.print();
            Ok(None)
        }
        Err(error) => Err(refused(&one_line(&error), help)),
    }
}

fn refused(message: &str, help: &str) -> Failure {
    Failure { code: Code::BadArguments, message: format!("{message} (see {help})") }
}

fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    // What is missing may follow in lines of its own, then an empty line and the usage.
    let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = lines.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Option<Args>, Failure> {
        Args::read(["pinfold"].iter().chain(words).map(OsString::from))
    }

    #[test]
    fn the_command_line_is_checked() {
        let args = read(&["--no-api", "--config-file", "vm.json", "--level", "debug"]).unwrap().unwrap();
        assert_eq!(args.level, Some(LevelFilter::Debug));
        assert_eq!(args.id.as_str(), "anonymous-instance");
        for bad in [
            &["--no-api"][..],
            &["--nope"],
            &["--id", "a_b"],
            &["--level", "loud"],
            &["vm.json"],
            &["--seccomp-filter", "f", "--no-seccomp"],
            &["--snapshot-version"],
            &["--cgroup", "{}", "--config-file", "f"],
        ] {
            let failure = read(bad).unwrap_err();
            assert_eq!(failure.code, Code::BadArguments, "{bad:?}");
            assert!(!failure.message.contains('\n'), "{}", failure.message);
        }
        let failure = read(&["--no-api"]).unwrap_err();
        assert!(failure.message.contains("--config-file"), "{}", failure.message);
    }

    #[test]
    fn the_shims_command_lines_are_taken() {
        // Kata's Go shim, its Rust shim, and what the jailer adds.
        read(&["--api-sock", "s", "--config-file", "c"]).unwrap().unwrap();
        read(&["--api-sock", "s", "--no-seccomp"]).unwrap().unwrap();
        assert!(read(&["--enable-pci"]).unwrap().unwrap().enable_pci);
        let times = ["--start-time-us", "1", "--start-time-cpu-us", "2", "--parent-cpu-time-us", "3"];
        let args = read(&[&["--id", "x"], &times[..]].concat()).unwrap().unwrap();
        assert_eq!(args.api_sock.as_os_str(), "/run/firecracker.socket");
        assert_eq!(args.mmds_limit(), 51200);
    }
}
