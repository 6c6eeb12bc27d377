//! `pinctl`: the command line of a microVM's API.

mod show;

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use api_server::{Client, Method};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use resources::chain;
use serde_json::{Value, json};

/// Exit code of `threads` when there are threads that are not where they belong.
const STRAYS: u8 = 3;

/// Asks a microVM, and tells it what to do.
///
/// Exit codes: 0 when it is done, 1 when not, and 3 when `threads` finds threads that are not where they belong.
#[derive(Debug, Parser)]
#[command(name = "pinctl", version, max_term_width = 100)]
struct Args {
    /// Unix socket of the microVM's API
    #[arg(long, global = true, default_value = "/run/firecracker.socket", value_name = "SOCKET")]
    api_sock: PathBuf,

    /// Print JSON in one line, as it comes, instead of tables
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Where each thread of the microVM is
    Threads,
    /// What the microVM was declared to be
    Config,
    /// Stop the vCPUs
    Pause,
    /// Let the vCPUs go on
    Resume,
    /// Ask the guest to shut down, by Ctrl, Alt and Del on its keyboard; a guest that does not listen goes on
    Stop,
    /// GET a path, such as /machine-config
    Get {
        /// The path
        path: String,
    },
    /// PUT to a path, such as /drives/data
    Put {
        /// The path
        path: String,
        /// The body; - for standard input
        #[arg(default_value = "-", hide_default_value = true)]
        body: String,
    },
    /// PATCH a path, such as /vm
    Patch {
        /// The path
        path: String,
        /// The body; - for standard input
        body: String,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            // A closed standard output is no reason to fail.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&format!("{} (see pinctl --help)", one_line(&error))),
    };
    match run(&args) {
        Ok(code) => code,
        Err(error) => fail(&chain(&*error)),
    }
}

fn run(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let client = Client::new(&args.api_sock);
    let get = |path| client.request(&Method::GET, path, None);
    let send = |method, path: &str, body: Value| client.request(&method, path, Some(body.to_string()));
    let (reply, show): (_, fn(&Value) -> String) = match &args.command {
        Command::Threads => (get("/cgroup/threads")?, show::threads),
        Command::Config => (get("/vm/config")?, show::config),
        Command::Pause => (send(Method::PATCH, "/vm", json!({ "state": "Paused" }))?, show::pretty),
        Command::Resume => (send(Method::PATCH, "/vm", json!({ "state": "Resumed" }))?, show::pretty),
        Command::Stop => {
            (send(Method::PUT, "/actions", json!({ "action_type": "SendCtrlAltDel" }))?, show::pretty)
        }
        Command::Get { path } => (get(path)?, show::pretty),
        Command::Put { path, body } => (client.request(&Method::PUT, path, Some(text(body)?))?, show::pretty),
        Command::Patch { path, body } => {
            (client.request(&Method::PATCH, path, Some(text(body)?))?, show::pretty)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "pinctl", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let Some(reply) = reply else { return Ok(ExitCode::SUCCESS) };
    print(&if args.json { format!("{reply}\n") } else { show(&reply) })?;
    let strays = matches!(args.command, Command::Threads) && show::has_strays(&reply);
    Ok(if strays { ExitCode::from(STRAYS) } else { ExitCode::SUCCESS })
}

/// A body as it was given.
fn text(body: &str) -> Result<String, Box<dyn Error>> {
    if body != "-" {
        return Ok(body.to_owned());
    }
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the body from standard input: {error}"))?;
    Ok(text)
}

/// Prints; nobody who stops to read is an error.
fn print(text: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

fn fail(message: &str) -> ExitCode {
    // There is nobody else to tell.
    let _ = writeln!(io::stderr(), "pinctl: {}", message.replace('\n', " "));
    ExitCode::FAILURE
}

fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    // What is missing may follow in lines of its own, then an empty line and the usage.
    let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = lines.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}
