//! Places its own threads as Pinfold does, prints where everything is, and cleans up:
//! `place [auto|v1|v2] [PARENT]`. Needs the rights to make groups there, so usually root.

use std::error::Error;
use std::time::Duration;

use cgroup::{Cleaner, Names, Parent, Request, Resources, Role, Tree, resolve};

fn main() -> Result<(), Box<dyn Error>> {
    if let Err(error) = run() {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        return Err(text.into());
    }
    Ok(())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let version = serde_json::from_value(args.next().unwrap_or("auto".to_owned()).into())?;
    let parent = args.next().map(|parent| parent.parse().map(Parent::Existing)).transpose()?;
    // The example of record: 2 CPUs and 400 MiB, 3 CPUs and 200 MiB; half a CPU and 64 MiB of overhead.
    let containers: Vec<Resources> = serde_json::from_str(
        r#"[{"cpu":{"shares":2048,"quota":200000,"period":100000},"memory":{"limit":419430400}},
            {"cpu":{"shares":3072,"quota":300000,"period":100000},"memory":{"limit":209715200}}]"#,
    )?;
    let overhead: Resources =
        serde_json::from_str(r#"{"cpu":{"quota":50000},"memory":{"limit":67108864},"pids":{"limit":100}}"#)?;
    let request = Request {
        version,
        parent,
        names: Names {
            sandbox: "kata-sandbox".parse()?,
            vcpus: "kata-sandbox-vcpus".parse()?,
            overhead: "kata-sandbox-overhead".parse()?,
        },
        containers,
        overhead: Some(overhead),
        id: "example".to_owned(),
    };

    let (tree, limits, cleaner) = resolve(&request)?.create()?;
    println!("{}", serde_json::to_string_pretty(&limits.in_force())?);
    let outcome = place(tree);
    // Through the form in which both would survive an exec.
    let (state, fds) = cleaner.into_parts();
    let cleaner = Cleaner::from_parts(serde_json::from_value(serde_json::to_value(state)?)?, fds)?;
    cleaner.leave_and_remove(Duration::from_secs(2))?;
    println!("after:");
    print_threads()?;
    outcome
}

fn place(tree: Tree) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string_pretty(tree.groups())?);
    println!("needs exec: {}", tree.needs_exec());
    tree.join(Role::Overhead)?;
    let (state, fds) = tree.into_parts();
    let tree = Tree::from_parts(serde_json::from_value(serde_json::to_value(state)?)?, fds)?;
    std::thread::scope(|scope| {
        let vcpu = std::thread::Builder::new().name("fc_vcpu 0".to_owned()).spawn_scoped(scope, || {
            tree.join(Role::Vcpu).map_err(|error| error.to_string())?;
            print_threads().map_err(|error| error.to_string())
        })?;
        vcpu.join().map_err(|_| "the vCPU thread panicked")?.map_err(Into::into)
    })
}

/// Every thread of this process with its groups.
fn print_threads() -> Result<(), Box<dyn Error>> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let dir = task?.path();
        println!("{}:", std::fs::read_to_string(dir.join("comm"))?.trim());
        for line in std::fs::read_to_string(dir.join("cgroup"))?.lines() {
            println!("    {line}");
        }
    }
    Ok(())
}
