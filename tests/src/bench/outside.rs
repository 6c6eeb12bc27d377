//! This machine's side: the host that measures, progress, and what comes of it.

use super::inside::BENCH;
use super::options::{MARK, Message, OPTIONS_FILE, Options};
use super::report::Report;
use super::{plot, vmm};
use crate::agent;
use crate::artifacts::{Binaries, binaries, target_dir};
use crate::case::{Failure, with_causes};
use crate::check;
use crate::host::boot::{add_guest_binary, link_binaries};
use crate::host::{BenchImage, Cpu, EmulatedHost, GuestFiles, HostError, bench_image, guest_files};
use crate::route::{Forced, Kind, Machine, Place, place};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the environment may say, for `--help`.
pub const ENVIRONMENT: &str = "\
Environment:
  PINFOLD_BENCH_FIRECRACKER       a static Firecracker to compare with
  PINFOLD_BENCH_CLOUD_HYPERVISOR  a static Cloud Hypervisor to compare with
  PINFOLD_BENCH_QEMU              the QEMU that emulates the counting host
  PINFOLD_BINARY                  another Pinfold to measure
  PINFOLD_TEST_HOST               `native` or `emulated`, where the choice is not left to the bench";

/// Peers that are not from Debian: the variable that names the binary, and its name in the job.
const GIVEN: [(&str, &str); 2] =
    [("PINFOLD_BENCH_FIRECRACKER", "firecracker"), ("PINFOLD_BENCH_CLOUD_HYPERVISOR", "cloud-hypervisor")];

/// Measures, prints the tables, and writes them to `target/bench`.
pub fn run(options: Options) -> Result<(), Failure> {
    for name in &options.only {
        let names: Vec<_> = vmm::ALL.iter().map(|vmm| vmm.name).collect();
        check!(names.contains(&name.as_str()), "there is no `{name}`; there are: {}", names.join(", "));
    }
    check!(
        !cfg!(debug_assertions),
        "an unoptimised build says nothing about speed: use `cargo bench -p tests`"
    );
    let forced = Forced::from_environment().map_err(Failure)?;
    let report = match place(&BENCH.needs, &Machine::detect(), forced) {
        Place::Nowhere(reason) => return Err(Failure(reason)),
        Place::Native => natively(Options { counting: false, ..options })?,
        Place::Emulated(kind, reason) => {
            eprintln!("pinfold: {kind}: emulated host, because {reason}");
            emulated(kind, options)?
        }
    };
    let folder = target_dir()?.join("bench");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    fs::write(folder.join("report.md"), report.markdown())?;
    for (group, drawing) in plot::drawings(&report)? {
        fs::write(folder.join(format!("{group}.svg")), drawing)?;
    }
    println!("{}", report.text());
    println!("Written to {}: report.md, report.json and a plot of each group.", folder.display());
    Ok(())
}

/// What the host's job is made of.
struct Parts {
    image: BenchImage,
    guest: GuestFiles,
    binaries: Binaries,
}

impl Parts {
    fn new() -> Result<Self, HostError> {
        Ok(Self { image: bench_image()?, guest: guest_files()?, binaries: binaries()? })
    }

    /// Puts the job into `folder`.
    fn fill(&self, folder: &Path, options: &Options) -> Result<(), HostError> {
        link_binaries(folder, &self.guest, &self.binaries)?;
        link(&self.image.small_initramfs, folder.join("initramfs"))?;
        add_guest_binary(&self.image.tools_initramfs, &self.binaries, &folder.join("tools"))?;
        for (variable, name) in GIVEN {
            if let Some(program) = std::env::var_os(variable) {
                link(Path::new(&program), folder.join(name))?;
            }
        }
        let path = folder.join(OPTIONS_FILE);
        let text = serde_json::to_vec(options).map_err(|error| HostError::Unexpected(error.to_string()))?;
        fs::write(&path, text).map_err(HostError::file("write", path))
    }
}

fn link(target: &Path, name: PathBuf) -> Result<(), HostError> {
    let target = fs::canonicalize(target).map_err(HostError::file("find", target))?;
    std::os::unix::fs::symlink(target, &name).map_err(HostError::file("link", name))
}

fn natively(options: Options) -> Result<Report, Failure> {
    eprintln!("pinfold: on this machine, measuring time; keep it idle meanwhile");
    let job = tempfile::Builder::new().prefix("pinfold-job-").tempdir()?;
    Parts::new()?.fill(job.path(), &options)?;
    let mut follower = Follower::new(&options, "this machine");
    agent::run_case(BENCH.name, job.path(), None, BENCH.timeout, &mut |text| follower.take(text))?;
    Ok(follower.finish())
}

fn emulated(kind: Kind, options: Options) -> Result<Report, Failure> {
    let parts = Parts::new()?;
    let cpu = if options.counting { Cpu::Counting } else { Cpu::Quick };
    match emulated_with(kind, cpu, &options, &parts) {
        Err(Ended::Host(error)) if cpu == Cpu::Counting => {
            eprintln!("pinfold: {}; measuring time instead, which is noisy there", with_causes(&error));
            let options = Options { counting: false, runs: options.runs.max(5), ..options };
            emulated_with(kind, Cpu::Quick, &options, &parts).map_err(Failure::from)
        }
        ended => ended.map_err(Failure::from),
    }
}

/// Why there is no report.
enum Ended {
    /// The host is the reason.
    Host(HostError),
    /// The bench is.
    Bench(Failure),
}

impl From<Ended> for Failure {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Host(error) => Self::from(error),
            Ended::Bench(failure) => failure,
        }
    }
}

fn emulated_with(kind: Kind, cpu: Cpu, options: &Options, parts: &Parts) -> Result<Report, Ended> {
    let mut host =
        EmulatedHost::boot_with(kind, &parts.image.host, cpu, |folder| parts.fill(folder, options))
            .map_err(Ended::Host)?;
    let mut follower = Follower::new(options, &format!("emulated host ({kind})"));
    match host.run(&BENCH, &mut |text| follower.take(text)) {
        Ok(Ok(())) => Ok(follower.finish()),
        Ok(Err(failure)) => Err(Ended::Bench(follower.failed(failure))),
        // What is there is worth more than nothing.
        Err(error) if follower.report.has_samples() => {
            let mut report = follower.finish();
            report.cut_short(with_causes(&error));
            Ok(report)
        }
        Err(error) => Err(Ended::Host(error)),
    }
}

/// Reads the measuring side's output.
struct Follower {
    report: Report,
    begun: String,
    /// Lines that are no messages: complaints of whatever runs there.
    rest: String,
    bar: Option<ProgressBar>,
}

impl Follower {
    fn new(options: &Options, host: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { report: Report::new(options, host), begun: String::new(), rest: String::new(), bar }
    }

    fn take(&mut self, text: &str) {
        self.begun.push_str(text);
        while let Some(end) = self.begun.find('\n') {
            let line: String = self.begun.drain(..=end).collect();
            let message = line.strip_prefix(MARK).and_then(|json| serde_json::from_str(json).ok());
            match message {
                Some(message) => self.obey(message),
                None => self.rest.push_str(&line),
            }
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Step { done, of, what } => match &self.bar {
                Some(bar) => {
                    bar.set_length(u64::try_from(of).unwrap_or(u64::MAX));
                    bar.set_position(u64::try_from(done).unwrap_or(u64::MAX));
                    bar.set_message(what);
                }
                None => eprintln!("pinfold: [{done}/{of}] {what}"),
            },
            Message::Sample(sample) => self.report.add(sample),
            Message::Unavailable { vmm, group, reason } => {
                let text = match group {
                    Some(group) => format!("{vmm}, {}: {reason}", group.title()),
                    None => format!("{vmm}: {reason}"),
                };
                match &self.bar {
                    Some(bar) => bar.println(&text),
                    None => eprintln!("pinfold: {text}"),
                }
                self.report.unavailable(text);
            }
        }
    }

    fn finish(self) -> Report {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.report
    }

    fn failed(self, failure: Failure) -> Failure {
        Failure(format!("{failure}\n{}", self.rest))
    }
}
