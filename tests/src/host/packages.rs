//! Debian packages that the harness needs on this machine, and where Debian's archive is.

use super::HostError;
use super::command::{as_root, can_be_root, run};
use super::progress::Step;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// The packages, each with a file that shows that it is there.
const PACKAGES: [(&str, &str); 9] = [
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("e2fsprogs", "/sbin/mke2fs"),
    ("xz-utils", "/usr/bin/xz"),
    // What cases use when they run on this machine.
    ("curl", "/usr/bin/curl"),
    ("iproute2", "/sbin/ip"),
    ("iputils-ping", "/usr/bin/ping"),
    ("debian-archive-keyring", KEYRING),
    ("apt", "/usr/bin/apt-get"),
];

/// The keys that Debian's archives are signed with.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists older than this are fetched anew before anything is installed.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Where Debian's archives are, as apt on this machine knows them.
#[derive(Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The archive with the releases and their backports.
    pub main: String,
    /// The archive with the security updates, where one is configured.
    pub security: Option<String>,
}

/// Kept by who has apt at work.
static APT: Mutex<()> = Mutex::new(());

/// Installs what is missing, with a word about it.
pub fn ensure() -> Result<(), HostError> {
    let _apt = APT.lock().unwrap_or_else(PoisonError::into_inner);
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !can_be_root() {
        return Err(HostError::Packages(missing.join(" ")));
    }
    let _step = Step::new(format!("installing Debian packages: {}", missing.join(" ")));
    if lists_stale() {
        update()?;
    }
    if install(&missing).is_err() {
        // Fresh enough by date, yet the archive has moved on.
        update()?;
        install(&missing)?;
    }
    Ok(())
}

/// The archive that this machine's own apt uses, or `PINFOLD_DEBIAN_MIRROR`.
pub fn mirror() -> Result<Mirror, HostError> {
    if let Ok(main) = std::env::var("PINFOLD_DEBIAN_MIRROR") {
        return Ok(Mirror { main, security: None });
    }
    let _apt = APT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mirror) = configured()? {
        return Ok(mirror);
    }
    // Without package lists apt cannot say which of its sources are Debian's.
    if can_be_root() {
        update()?;
    }
    configured()?.ok_or(HostError::NoMirror)
}

/// How this machine's apt reaches archives (proxies, certificates, date checks), as lines of apt.conf.
pub fn transport_settings() -> Result<String, HostError> {
    const WANTED: [&str; 5] = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
        "Acquire::Retries ",
    ];
    let dump = run("reading apt's settings", Command::new("apt-config").args(["dump", "Acquire"]))?;
    Ok(dump
        .lines()
        .filter(|line| WANTED.iter().any(|prefix| line.starts_with(prefix)))
        .map(|line| format!("{line}\n"))
        .collect())
}

fn configured() -> Result<Option<Mirror>, HostError> {
    let targets = run(
        "asking apt for its archives",
        Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(LABEL) $(CODENAME) $(REPO_URI)",
            "Created-By: Packages",
        ]),
    )?;
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename =
        release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or_default();
    Ok(parse_targets(&targets, codename.trim_matches('"')))
}

/// Picks Debian's archives of the release `codename` from lines of origin, label, codename and URI.
fn parse_targets(targets: &str, codename: &str) -> Option<Mirror> {
    let mut main = None;
    let mut security = None;
    for line in targets.lines() {
        // Debian's labels are `Debian` and `Debian-Security`: no blanks, like the other fields.
        let [origin, _label, suite, uri] = line.split_whitespace().collect::<Vec<_>>()[..] else { continue };
        if origin != "Debian" || codename.is_empty() {
            continue;
        }
        if suite == codename {
            main.get_or_insert_with(|| uri.to_owned());
        } else if suite == format!("{codename}-security") {
            security.get_or_insert_with(|| uri.to_owned());
        }
    }
    Some(Mirror { main: main?, security })
}

fn install(packages: &[&str]) -> Result<(), HostError> {
    run(
        "installing packages",
        as_root("env")
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "--no-install-recommends"])
            .args(packages),
    )
    .map(drop)
}

fn update() -> Result<(), HostError> {
    run("fetching package lists", as_root("apt-get").arg("update")).map(drop)
}

/// Whether apt's package lists are missing or old.
fn lists_stale() -> bool {
    let newest = std::fs::read_dir("/var/lib/apt/lists")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        .filter_map(|entry| entry.metadata().ok()?.modified().ok())
        .max();
    // `apt-get update` keeps the archive's own dates on the lists, so the folder's date counts too.
    let checked = std::fs::metadata("/var/lib/apt/lists/partial").and_then(|data| data.modified()).ok();
    match newest {
        None => true,
        Some(newest) => {
            let last = checked.map_or(newest, |checked| checked.max(newest));
            SystemTime::now().duration_since(last).is_ok_and(|age| age > STALE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_release_is_picked_among_many() {
        let targets = "Node nodesource nodistro https://node.example/x/\n\
                       Debian Debian bookworm http://one.example/debian/\n\
                       Debian Debian bookworm-updates http://one.example/debian/\n\
                       Debian Debian trixie http://two.example/debian/\n\
                       Debian Debian-Security bookworm-security http://sec.example/debian-security/\n";
        let mirror = parse_targets(targets, "bookworm").unwrap();
        assert_eq!(mirror.main, "http://one.example/debian/");
        assert_eq!(mirror.security.as_deref(), Some("http://sec.example/debian-security/"));
        assert_eq!(parse_targets(targets, "trixie").unwrap().main, "http://two.example/debian/");
        assert_eq!(parse_targets(targets, "noble"), None);
        assert_eq!(parse_targets("", "bookworm"), None);
    }
}
