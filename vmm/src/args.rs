//! The command line.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;
use log::LevelFilter;
use resources::InstanceId;

use crate::exit::{Code, Failure};

/// A micro-VMM that keeps each of its threads in the cgroup that the pod pays for.
#[derive(Debug, Parser)]
#[command(name = "pinfold", version, max_term_width = 100)]
pub struct Args {
    /// JSON file that describes the microVM: Firecracker's format with the section "cgroup"
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,

    /// Start what the configuration file says, without an API socket
    #[arg(long, requires = "config_file")]
    pub no_api: bool,

    /// Name of the microVM: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = "anonymous-instance", value_name = "ID")]
    pub id: InstanceId,

    /// What is logged to standard error: Off, Error, Warn, Info, Debug or Trace
    #[arg(long, default_value = "Warn", value_parser = |text: &str| text.parse::<LevelFilter>().map_err(|_| "say Off, Error, Warn, Info, Debug or Trace"), value_name = "LEVEL")]
    pub level: LevelFilter,

    /// Internal: the descriptor that a process left to itself before it executed itself anew
    #[arg(long, hide = true)]
    pub handover: Option<RawFd>,

    /// Internal: the descriptor that says what this process is to remove
    #[arg(long, hide = true)]
    pub reap: Option<RawFd>,
}

impl Args {
    /// Reads the command line; prints help or version and returns `None` where that is what was asked for.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, Failure> {
        match Self::try_parse_from(arguments) {
            Ok(args) => Ok(Some(args)),
            Err(error) if !error.use_stderr() => {
                // A closed standard output is no reason to fail.
                let _ = error.print();
                Ok(None)
            }
            Err(error) => {
                let text = error.to_string();
                // What is missing may follow in lines of its own, then an empty line and the usage.
                let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
                let line = lines.join(" ");
                let line = line.strip_prefix("error: ").unwrap_or(&line);
                Err(Failure { code: Code::BadArguments, message: format!("{line} (see pinfold --help)") })
            }
        }
    }
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
        assert_eq!(args.level, LevelFilter::Debug);
        assert_eq!(args.id.as_str(), "anonymous-instance");
        for bad in [&["--no-api"][..], &["--nope"], &["--id", "a_b"], &["--level", "loud"], &["vm.json"]] {
            let failure = read(bad).unwrap_err();
            assert_eq!(failure.code, Code::BadArguments, "{bad:?}");
            assert!(!failure.message.contains('\n'), "{}", failure.message);
        }
        let failure = read(&["--no-api"]).unwrap_err();
        assert!(failure.message.contains("--config-file"), "{}", failure.message);
    }
}
