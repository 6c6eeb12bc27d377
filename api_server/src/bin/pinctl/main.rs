//! `pinctl`: the command line of a microVM's API.

mod groups;
mod show;
mod stats;
mod why;

use std::error::Error;
use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
    /// The containers whose sum is the microVM's share
    #[command(subcommand)]
    Container(Container),
    /// What the groups used and waited for, in all and over a moment
    Stats {
        /// Seconds over which shares are measured
        #[arg(long, default_value_t = 1.0, value_parser = seconds)]
        interval: f64,
    },
    /// The same again and again, with each thread
    Top {
        /// Seconds between one and the next
        #[arg(long, default_value_t = 2.0, value_parser = seconds)]
        interval: f64,
        /// How often; without it until it is interrupted
        #[arg(long)]
        count: Option<u64>,
    },
    /// Processes killed for memory and memory at its limit, in the group and those above it
    Events {
        /// Only those with a higher number
        #[arg(long, default_value_t = 0)]
        since: u64,
        /// Wait for more until it is interrupted
        #[arg(long)]
        follow: bool,
    },
    /// Why it is slow: what holds the vCPUs, and Pinfold's other threads, back
    Why {
        /// Milliseconds for which to look
        #[arg(long, default_value_t = 1000)]
        window_ms: u64,
    },
    /// What other limits would do to the vCPUs, by what they use now; what is not given is as in force
    WhatIf {
        /// Microseconds of CPU time in each period, 1000 or more, or max for no limit
        #[arg(long)]
        quota: Option<String>,
        /// The period in microseconds, 1000 to 1000000; 100000 by default
        #[arg(long, requires = "quota")]
        period: Option<u64>,
        /// The CPUs to run on, such as 0-3,7
        #[arg(long)]
        cpus: Option<String>,
        /// Milliseconds for which to record what the vCPUs use
        #[arg(long, default_value_t = 2000)]
        window_ms: u64,
    },
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

#[derive(Debug, Subcommand)]
enum Container {
    /// Add a container, or change it; the limits follow
    Add {
        /// Its id
        id: String,
        /// How many CPUs it may use, such as 0.5
        #[arg(long, value_parser = groups::quota)]
        cpus: Option<i64>,
        /// Its weight: 1024 is that of one that says nothing
        #[arg(long)]
        cpu_shares: Option<u64>,
        /// The CPUs that it may run on, such as 0-3,7
        #[arg(long)]
        cpuset_cpus: Option<String>,
        /// The memory that it may use, in bytes or with a K, M or G for 1024, 1024^2 or 1024^3 of them
        #[arg(long, value_parser = groups::bytes)]
        memory: Option<i64>,
        /// OCI LinuxResources instead of all these; - for standard input
        #[arg(long, conflicts_with_all = ["cpus", "cpu_shares", "cpuset_cpus", "memory"])]
        resources: Option<String>,
    },
    /// Remove a container; the limits follow
    Rm {
        /// Its id
        id: String,
    },
    /// The containers, and the limits that their sum makes
    List,
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
    let get = |path: &str| client.request(&Method::GET, path, None);
    let send = |method, path: &str, body: Value| client.request(&method, path, Some(body.to_string()));
    let (reply, show): (_, fn(&Value) -> String) = match &args.command {
        Command::Threads => (get("/cgroup/threads")?, show::threads),
        Command::Config => (get("/vm/config")?, show::config),
        Command::Container(Container::List) => (get("/cgroup")?, groups::containers),
        Command::Container(Container::Rm { id }) => {
            let path = format!("/cgroup/containers/{id}");
            (client.request(&Method::DELETE, &path, None)?, show::pretty)
        }
        Command::Container(Container::Add { id, cpus, cpu_shares, cpuset_cpus, memory, resources }) => {
            let resources = match resources {
                Some(given) => serde_json::from_str(&text(given)?)
                    .map_err(|error| format!("--resources is no JSON: {error}"))?,
                None => groups::resources(*cpus, *cpu_shares, cpuset_cpus.as_deref(), *memory),
            };
            let body = json!({ "id": id, "resources": resources });
            (send(Method::PUT, &format!("/cgroup/containers/{id}"), body)?, show::pretty)
        }
        Command::Stats { interval } => return watch(args, &client, *interval, Some(1)),
        Command::Top { interval, count } => return watch(args, &client, *interval, *count),
        Command::Events { since, follow } => return events(args, &client, *since, *follow),
        Command::Why { window_ms } => {
            (get(&format!("/cgroup/diagnosis?window_ms={window_ms}"))?, why::diagnosis)
        }
        Command::WhatIf { quota, period, cpus, window_ms } => {
            let path = why::question(quota.as_deref(), *period, cpus.as_deref(), *window_ms);
            (get(&path)?, why::what_if)
        }
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

/// Shows statistics `count` times, or for ever.
fn watch(
    args: &Args,
    client: &Client,
    interval: f64,
    count: Option<u64>,
) -> Result<ExitCode, Box<dyn Error>> {
    let sample = || client.request(&Method::GET, "/cgroup/stats", None).map(Option::unwrap_or_default);
    let threads = matches!(args.command, Command::Top { .. });
    let mut before = sample()?;
    let mut shown = 0;
    while count.is_none_or(|count| shown < count) {
        std::thread::sleep(Duration::from_secs_f64(interval));
        let now = sample()?;
        let page = stats::page(&before, &now, threads);
        // Each page of a terminal's starts at its top.
        let clear = if threads && !args.json && io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        print(&if args.json { format!("{now}\n") } else { format!("{clear}{page}") })?;
        before = now;
        shown += 1;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows events, and waits for more where asked to.
fn events(args: &Args, client: &Client, since: u64, follow: bool) -> Result<ExitCode, Box<dyn Error>> {
    let (mut since, mut timeout) = (since, 0);
    loop {
        let path = format!("/cgroup/events?since={since}&timeout_ms={timeout}");
        let reply = client.request(&Method::GET, &path, None)?.unwrap_or_default();
        print(&if args.json { format!("{reply}\n") } else { groups::events(&reply, timeout == 0) })?;
        if !follow {
            return Ok(ExitCode::SUCCESS);
        }
        since = reply["last_id"].as_u64().unwrap_or(since);
        timeout = 20_000;
    }
}

/// A time that makes sense between two looks.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give 0.1 to 3600 seconds".to_owned()),
    }
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
