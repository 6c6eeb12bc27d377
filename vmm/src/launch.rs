//! From the command line to a running microVM, and to the process's exit code.

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use resources::{ConfigError, MicrovmConfig, OciSpec};
use rustix::fs::OFlags;
use serde_json::Value;

use crate::args::Args;
use crate::exit::{Code, Failure};
use crate::placement::{Founded, Image, Order, Placement};
use crate::reaper::Watch;
use crate::seccomp::{Filters, PolicyError};
use crate::source::Source;
use crate::{footprint, jail, logger, lookup, reaper, session, sink};

/// The largest file that is read, in bytes.
const MAX_CONFIG: u64 = 4 << 20;

/// Runs the process: the whole of `main`.
pub fn main() -> ExitCode {
    match launch() {
        Ok(code) => code.into(),
        Err(failure) => {
            // Nobody may be there to read it: the exit code still tells.
            let _ = writeln!(io::stderr(), "pinfold: {}", failure.message);
            failure.code.into()
        }
    }
}

fn launch() -> Result<Code, Failure> {
    lookup::discover();
    if let Some(words) = jail::asked_for(std::env::args_os()) {
        return jail::run(words);
    }
    let Some(args) = Args::read(std::env::args_os())? else {
        return Ok(Code::Ok);
    };
    if let Some(fd) = args.reap {
        return reaper::run(fd).map(|()| Code::Ok).map_err(|error| Failure::generic(&error));
    }
    logger::init(args.id.as_str(), args.level.unwrap_or(log::LevelFilter::Warn));
    footprint::share_heap();
    let (placement, order) = match args.handover {
        Some(fd) => Placement::resume(fd).map_err(|error| Failure::configuration(&error))?,
        None => {
            let order = read_order(&args, &Source::Host).map_err(|error| Failure::configuration(&error))?;
            order.filters.hide_backtraces();
            let placed = Image::open().and_then(|image| {
                let report = args.exit_report.as_deref().map(|file| move || sink::open(file));
                let socket = (!args.no_api).then_some(args.api_sock.as_path());
                match Founded::found(&args.id, &order, report, &[])? {
                    Some(founded) => {
                        let watch = Watch { socket, ..Watch::ourselves(args.id.as_str(), &order.filters) };
                        founded.settle(&image, watch)?.exec(&image, &order)
                    }
                    None => Ok(Placement::Unplaced),
                }
            });
            (placed.map_err(|error| Failure::configuration(&error))?, order)
        }
    };
    let result = session::run(&args, order, &placement);
    placement.dissolve(result.as_ref().map_or_else(|failure| failure.code, |code| *code));
    result
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("cannot read {path}", path = .0.display())]
    Io(PathBuf, #[source] io::Error),
    #[error("{path} is larger than {MAX_CONFIG} bytes", path = .0.display())]
    Large(PathBuf),
    #[error("{path} holds no JSON", path = .0.display())]
    Json(PathBuf, #[source] serde_json::Error),
    #[error("--seccomp-filter {path}", path = .0.display())]
    Policy(PathBuf, #[source] PolicyError),
    #[error("{path}", path = .0.display())]
    Config(PathBuf, #[source] ConfigError),
}

/// Reads all that the command line names.
pub(crate) fn read_order(args: &Args, source: &Source<'_>) -> Result<Order, ReadError> {
    let mut config = match (&args.config_file, &args.cgroup) {
        (Some(path), _) => parse(source, path, &read(source, path)?)?,
        (None, Some(section)) => cgroup_section(source, section)?,
        (None, None) => MicrovmConfig::default(),
    };
    let metadata = args.metadata.as_ref().map(|path| {
        serde_json::from_str(&read(source, path)?).map_err(|error| ReadError::Json(path.clone(), error))
    });
    let filters = match &args.seccomp_filter {
        Some(path) => {
            Filters::custom(&read(source, path)?).map_err(|error| ReadError::Policy(path.clone(), error))?
        }
        None if args.no_seccomp => Filters::Off,
        None => Filters::BuiltIn,
    };
    let cgroups_path = take_up_spec(source, &mut config)?;
    config.size_from_containers().map_err(|error| {
        let named = args.config_file.clone().unwrap_or_else(|| "--cgroup".into());
        ReadError::Config(named, error)
    })?;
    let start = args.config_file.is_some();
    Ok(Order { config, cgroups_path, start, metadata: metadata.transpose()?, filters })
}

/// Takes up what the OCI specification that `config` names says, but for its `linux.cgroupsPath`, which is returned.
fn take_up_spec(source: &Source<'_>, config: &mut MicrovmConfig) -> Result<Option<String>, ReadError> {
    let Some(mut path) = config.cgroup.oci_spec.clone() else { return Ok(None) };
    if source.open(&path, OFlags::RDONLY | OFlags::DIRECTORY).is_ok() {
        path.push("config.json");
    }
    let spec =
        OciSpec::from_json(&read(source, &path)?).map_err(|error| ReadError::Config(path.clone(), error))?;
    config.take_up(&spec).map_err(|error| ReadError::Config(path, error))?;
    Ok(spec.cgroups_path)
}

/// A microVM of which only the section `cgroup` is declared: as JSON text, or by a file that holds it.
fn cgroup_section(source: &Source<'_>, section: &str) -> Result<MicrovmConfig, ReadError> {
    let inline = section.trim_start().starts_with('{');
    let text = if inline { section.to_owned() } else { read(source, Path::new(section))? };
    let named = if inline { "--cgroup" } else { section };
    MicrovmConfig::from_cgroup_json(&text).map_err(|error| ReadError::Config(named.into(), error))
}

fn parse(source: &Source<'_>, path: &Path, text: &str) -> Result<MicrovmConfig, ReadError> {
    // Firecracker's file has the name of another file there, the API the template itself. Both are taken.
    let mut text = Cow::Borrowed(text);
    if let Ok(mut config) = serde_json::from_str::<Value>(&text)
        && let Some(template) = config.get("cpu-config").and_then(Value::as_str).map(PathBuf::from)
    {
        config["cpu-config"] = serde_json::from_str(&read(source, &template)?)
            .map_err(|error| ReadError::Json(template, error))?;
        text = Cow::Owned(config.to_string());
    }
    MicrovmConfig::from_json(&text).map_err(|error| ReadError::Config(path.to_owned(), error))
}

/// Reads a file once, so that it may be a FIFO.
fn read(source: &Source<'_>, path: &Path) -> Result<String, ReadError> {
    let mut text = String::new();
    let size = source
        .open(path, OFlags::RDONLY)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_string(&mut text))
        .map_err(|error| ReadError::Io(path.to_owned(), error))?;
    if size as u64 > MAX_CONFIG {
        return Err(ReadError::Large(path.to_owned()));
    }
    Ok(text)
}
