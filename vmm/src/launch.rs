//! From the command line to a running microVM, and to the process's exit code.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use resources::{ConfigError, MicrovmConfig};

use crate::args::Args;
use crate::exit::{Code, Failure};
use crate::placement::{Image, Placement};
use crate::{logger, machine, reaper};

/// The largest configuration file that is read, in bytes.
const MAX_CONFIG: u64 = 4 << 20;

/// Runs the process: the whole of `main`.
pub fn main() -> ExitCode {
    match launch() {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("pinfold: {}", failure.message);
            failure.code.into()
        }
    }
}

fn launch() -> Result<Code, Failure> {
    let Some(args) = Args::read(std::env::args_os())? else {
        return Ok(Code::Ok);
    };
    if let Some(fd) = args.reap {
        return reaper::run(fd).map(|()| Code::Ok).map_err(|error| Failure::generic(&error));
    }
    logger::init(args.id.as_str(), args.level);
    if let Some(fd) = args.handover {
        let (placement, config) = Placement::resume(fd).map_err(|error| Failure::configuration(&error))?;
        return serve(&config, placement);
    }
    let Some(path) = args.config_file.as_deref().filter(|_| args.no_api) else {
        let message =
            "this version has no API server yet: say --no-api --config-file FILE (see pinfold --help)";
        return Err(Failure { code: Code::BadArguments, message: message.to_owned() });
    };
    let config = read_config(path).map_err(|error| Failure::configuration(&error))?;
    let placed = Image::open()
        .and_then(|image| Placement::establish(&image, &args.id, &config.cgroup)?.exec(&image, &config));
    let placement = placed.map_err(|error| Failure::configuration(&error))?;
    serve(&config, placement)
}

/// Runs the microVM in its place, and leaves nothing behind.
fn serve(config: &MicrovmConfig, placement: Placement) -> Result<Code, Failure> {
    let result = machine::run(config, &placement);
    placement.dissolve();
    result
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot read the configuration file {path}", path = .0.display())]
    Io(PathBuf, #[source] io::Error),
    #[error("the configuration file {path} is larger than {MAX_CONFIG} bytes", path = .0.display())]
    Large(PathBuf),
    #[error("{path}", path = .0.display())]
    Config(PathBuf, #[source] ConfigError),
}

/// Reads the configuration file once, so that it may be a FIFO.
fn read_config(path: &Path) -> Result<MicrovmConfig, ReadError> {
    let mut text = String::new();
    let size = File::open(path)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_string(&mut text))
        .map_err(|error| ReadError::Io(path.to_owned(), error))?;
    if size as u64 > MAX_CONFIG {
        return Err(ReadError::Large(path.to_owned()));
    }
    MicrovmConfig::from_json(&text).map_err(|error| ReadError::Config(path.to_owned(), error))
}
