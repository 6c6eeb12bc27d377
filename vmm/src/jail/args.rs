//! The command line of `pinfold jail`: Firecracker's jailer's.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use resources::{CgroupVersion, InstanceId};

use crate::args;
use crate::exit::Failure;
use crate::version;

/// Runs a microVM in a jail: a root, a user and namespaces of its own, without any capability.
///
/// What follows `--` is the microVM's command line. Paths in it, and in the files that it names, are those in the jail,
/// whose root is BASE/NAME/ID/root, where NAME is that of the executable. Only folders to share are those of the host.
#[derive(Debug, Parser)]
#[command(
    name = "jailer",
    bin_name = "pinfold jail",
    version = version::JAILER,
    max_term_width = 100,
    override_usage = "pinfold jail --id ID --exec-file FILE --uid UID --gid GID [OPTIONS] -- [OPTIONS of pinfold]"
)]
pub struct JailArgs {
    /// Name of the microVM: 1 to 64 letters, digits and hyphens
    #[arg(long, value_name = "ID")]
    pub id: InstanceId,

    /// The executable, which is copied into the jail: this version of pinfold, under any name
    #[arg(long, value_name = "FILE")]
    pub exec_file: PathBuf,

    /// User that the microVM runs as: a number
    #[arg(long, value_name = "UID", value_parser = number)]
    pub uid: u32,

    /// Its group: a number
    #[arg(long, value_name = "GID", value_parser = number)]
    pub gid: u32,

    /// Absolute path of the folder that jails are made in
    #[arg(long, default_value = "/srv/jailer", value_name = "BASE")]
    pub chroot_base_dir: PathBuf,

    /// File of a network namespace to run in, such as /run/netns/NAME
    #[arg(long, value_name = "FILE")]
    pub netns: Option<PathBuf>,

    /// Run in a session of its own, with /dev/null as the three standard streams
    #[arg(long)]
    pub daemonize: bool,

    /// Run as the first process of a PID namespace of its own; this process ends when it runs
    #[arg(long)]
    pub new_pid_ns: bool,

    /// A value for a file of the cgroup that the microVM's groups are made in, such as memory.max=1G; may be repeated
    #[arg(long = "cgroup", value_name = "FILE=VALUE", value_parser = assignment)]
    pub cgroups: Vec<(String, String)>,

    /// A limit: fsize=BYTES of a file, or no-file=N descriptors, 2048 by default; may be repeated
    #[arg(long = "resource-limit", value_name = "NAME=N", value_parser = limit)]
    pub limits: Vec<Limit>,

    /// Which cgroups to use: 1 or 2; by default what the section "cgroup" says
    #[arg(long, value_name = "VERSION", value_parser = cgroup_version)]
    pub cgroup_version: Option<CgroupVersion>,

    /// Absolute path of a folder on the host that the microVM may share with its guest (`shared_dir` of the section `fs`), by
    /// a virtiofsd outside of the jail; may be repeated
    #[arg(long = "share", value_name = "DIR", value_parser = absolute)]
    pub shares: Vec<PathBuf>,

    /// Relative path of the cgroup in which one by the name ID is made for the microVM; the executable's name by default,
    /// if there is a --cgroup
    #[arg(long, value_name = "PATH", value_parser = relative)]
    pub parent_cgroup: Option<String>,

    /// The microVM's command line
    #[arg(last = true, value_name = "OPTIONS")]
    pub vmm: Vec<OsString>,
}

/// A limit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The largest size of a file that is written, in bytes.
    FileSize(u64),
    /// How many descriptors may be open.
    Descriptors(u64),
}

fn number(text: &str) -> Result<u32, &'static str> {
    match text.parse() {
        // As an argument of setuid(2) it means: none.
        Ok(u32::MAX) => Err("the kernel keeps this number for nobody at all"),
        Ok(number) => Ok(number),
        Err(_) => Err("give it as a number; `id` tells those of a name"),
    }
}

fn assignment(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((file, value)) if !file.is_empty() && !value.is_empty() => {
            Ok((file.to_owned(), value.to_owned()))
        }
        _ => Err("say FILE=VALUE, such as memory.max=1G"),
    }
}

fn limit(text: &str) -> Result<Limit, &'static str> {
    let (name, value) = text.split_once('=').unwrap_or_default();
    match (name, value.parse()) {
        ("fsize", Ok(bytes)) => Ok(Limit::FileSize(bytes)),
        ("no-file", Ok(count)) => Ok(Limit::Descriptors(count)),
        _ => Err("say fsize=BYTES or no-file=N"),
    }
}

fn cgroup_version(text: &str) -> Result<CgroupVersion, &'static str> {
    match text {
        "1" => Ok(CgroupVersion::V1),
        "2" => Ok(CgroupVersion::V2),
        _ => Err("say 1 or 2"),
    }
}

fn absolute(text: &str) -> Result<PathBuf, &'static str> {
    match text.starts_with('/') {
        true => Ok(text.into()),
        false => Err("give an absolute path"),
    }
}

fn relative(text: &str) -> Result<String, &'static str> {
    let plain = |part: &str| !["", ".", ".."].contains(&part);
    if text.split('/').all(plain) {
        Ok(text.to_owned())
    } else {
        Err("give a relative path without . and ..")
    }
}

impl JailArgs {
    /// Reads the command line; prints help or version and returns `None` where that is what was asked for.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, Failure> {
        args::parse(arguments, "pinfold jail --help")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Code;

    const LEAST: [&str; 8] = ["--id", "a", "--exec-file", "/bin/pinfold", "--uid", "7", "--gid", "8"];

    fn read(words: &[&str]) -> Result<Option<JailArgs>, Failure> {
        JailArgs::read(["jailer"].iter().chain(words).map(OsString::from))
    }

    #[test]
    fn the_jailers_command_line_is_taken() {
        let args = read(&LEAST).unwrap().unwrap();
        assert_eq!((args.uid, args.gid, args.chroot_base_dir.to_str()), (7, 8, Some("/srv/jailer")));
        // As Kata's shim has it.
        let words = ["--daemonize", "--netns", "/n", "--", "--config-file", "/fcConfig.json"];
        let args = read(&[&LEAST[..], &words].concat()).unwrap().unwrap();
        assert!(args.daemonize && !args.new_pid_ns);
        assert_eq!(args.vmm, ["--config-file", "/fcConfig.json"]);
        let words = [
            "--cgroup",
            "io.max=8:0 rbps=1",
            "--cgroup=cpu.shares=2",
            "--resource-limit",
            "fsize=1",
            "--resource-limit=no-file=2",
            "--cgroup-version",
            "2",
            "--parent-cgroup",
            "a/b",
            "--share",
            "/data/a",
            "--share=/data/b",
            "--new-pid-ns",
        ];
        let args = read(&[&LEAST[..], &words].concat()).unwrap().unwrap();
        assert_eq!(args.cgroups[0], ("io.max".to_owned(), "8:0 rbps=1".to_owned()));
        assert_eq!(args.limits, [Limit::FileSize(1), Limit::Descriptors(2)]);
        assert_eq!(args.cgroup_version, Some(CgroupVersion::V2));
        assert_eq!(args.shares, [PathBuf::from("/data/a"), "/data/b".into()]);
        assert!(version::line().ends_with(version::JAILER), "it is the same version");
        assert!(read(&["--version"]).unwrap().is_none());
        assert!(read(&["--help"]).unwrap().is_none());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (bad, word) in [
            (&["--cgroup", "memory.max"][..], "FILE=VALUE"),
            (&["--cgroup", "memory.max="], "FILE=VALUE"),
            (&["--resource-limit", "fsize=x"], "fsize=BYTES"),
            (&["--resource-limit", "cpu=1"], "fsize=BYTES"),
            (&["--cgroup-version", "3"], "1 or 2"),
            (&["--share", "data"], "absolute path"),
            (&["--parent-cgroup", "/a"], "relative path"),
            (&["--parent-cgroup", "a/../b"], "relative path"),
            (&["--node", "0"], "--node"),
            (&["stray"], "stray"),
        ] {
            let failure = read(&[&LEAST[..], bad].concat()).unwrap_err();
            assert_eq!(failure.code, Code::BadArguments, "{bad:?}");
            assert!(failure.message.contains(word), "{}", failure.message);
            assert!(failure.message.contains("pinfold jail --help"), "{}", failure.message);
        }
        for (at, value, word) in
            [(1, "a_b", "a_b"), (5, "root", "number"), (5, "4294967295", "nobody"), (7, "wheel", "--gid")]
        {
            let mut words = LEAST;
            words[at] = value;
            let failure = read(&words).unwrap_err();
            assert!(failure.message.contains(word), "{}", failure.message);
        }
        let failure = read(&LEAST[..4]).unwrap_err();
        assert!(
            failure.message.contains("--uid") && failure.message.contains("--gid"),
            "{}",
            failure.message
        );
    }
}
