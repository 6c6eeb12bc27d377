//! `pinfold jail`: from a process of the host's to a microVM's that sees nothing of the host.
//!
//! It is the way of [`crate::launch`], join and then exec, with walls between the two:
//!
//! 1. On the host the command lines and the files of the microVM's are read (in the jail's root, by descriptor), the groups
//!    are made and joined, and all that will be needed of the host is opened: the groups' files, the threads in /proc.
//! 2. With a PID namespace, or to begin a session, another process is made. The reaper is told of the one that goes on. It
//!    is outside of all that follows.
//! 3. That process leaves for its namespaces and its root, furnishes it, and gives up its rights.
//! 4. It executes the copy of Pinfold in the jail, which resumes as after every launch, and adds Landlock.
//!
//! | module | what it is |
//! | --- | --- |
//! | `args` | the command line |
//! | `home` | the folder that is the root, and what is put into it |
//! | `walls` | namespaces and the root |
//! | `rights` | limits, the user, capabilities |
//! | `inside` | what the process in the jail knows of the host |

mod args;
mod home;
pub mod inside;
mod rights;
mod walls;

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use resources::{CgroupVersion, Driver, VhostMode};

use self::args::JailArgs;
use self::home::{Furniture, Home, Node};
use self::inside::Facts;
use crate::args::Args;
use crate::descriptors::MARK;
use crate::exit::{Code, Failure};
use crate::fork::{Side, fork};
use crate::launch::{ReadError, read_order};
use crate::lookup::{self, Root};
use crate::placement::{Founded, Image, Order, Placement, PlacementError};
use crate::reaper::{Ends, Watch};
use crate::source::Source;
use crate::virtiofsd::{Sharing, VirtiofsdError};
use crate::{logger, memory, sink};

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Not root.
    #[error(
        "a jail is made by root: run it as root, or as the user 0 of a user namespace that has the capabilities"
    )]
    NotRoot,
    /// The base's path is not absolute.
    #[error("--chroot-base-dir {}: give an absolute path", .0.display())]
    Relative(PathBuf),
    /// Another microVM is there.
    #[error("the jail {} is in use by another microVM: end that, or give another --id", .0.display())]
    InUse(PathBuf),
    /// What is needed could not be used there.
    #[error("the jail {} is on a file system that is mounted {word}: name another --chroot-base-dir", path.display())]
    MountOption {
        /// The jail.
        path: PathBuf,
        /// The option.
        word: &'static str,
    },
    /// The executable is none.
    #[error("--exec-file {}: it is no regular file", .0.display())]
    NotAFile(PathBuf),
    /// The executable is another program.
    #[error(
        "--exec-file {} is not pinfold {version}: the jail starts the version of pinfold that it belongs to, under any \
         name, and nothing else",
        .0.display(),
        version = crate::version::PINFOLD
    )]
    Foreign(PathBuf),
    /// The host lacks a device.
    #[error("the host has no {0}: load its module")]
    NoDevice(&'static str),
    /// The section and the command line name different groups.
    #[error(
        "--cgroup and --parent-cgroup name the group themselves: leave cgroup.{0} out of the configuration"
    )]
    TwoParents(&'static str),
    /// The section and the command line ask for different versions.
    #[error(
        "--cgroup-version and cgroup.version of the configuration say different things: leave one of the two out"
    )]
    TwoVersions,
    /// Something about a file.
    #[error("cannot {doing} {}", path.display())]
    Path {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A folder cannot be shared.
    #[error("--share")]
    Share(#[from] VirtiofsdError),
    /// Nobody would start its server.
    #[error(
        "--share: servers are started from the side of the process that removes the groups, and with \"driver\": \"none\" \
         in the section cgroup there is none; leave one of the two out"
    )]
    NoStarter,
    /// A system call failed.
    #[error("cannot {doing} for the jail")]
    Call {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The placement.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

impl From<JailError> for Failure {
    fn from(error: JailError) -> Self {
        Self::configuration(&error)
    }
}

/// Whether this is the command line of a jailer, and that: by its first word, or by the name that it was called by.
pub fn asked_for(arguments: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut words: Vec<OsString> = arguments.into_iter().collect();
    if words.get(1).is_some_and(|word| word == "jail") {
        words.remove(1);
        return Some(words);
    }
    let called = words.first().map(PathBuf::from)?;
    (called.file_name() == Some(OsStr::new("jailer"))).then_some(words)
}

/// Puts this process, or one that it makes, into a jail. Returns only where there is nothing more to do.
pub fn run(words: Vec<OsString>) -> Result<Code, Failure> {
    let Some(args) = JailArgs::read(words)? else { return Ok(Code::Ok) };
    if !rustix::process::geteuid().is_root() {
        return Err(JailError::NotRoot.into());
    }
    logger::init(args.id.as_str(), log::LevelFilter::Warn);
    walls::close_inherited()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let (name, executable) = executable(&args)?;
    let began = began();
    let command_line: Vec<OsString> = [name.clone(), "--id".into(), args.id.as_str().into()]
        .into_iter()
        .chain(began)
        .chain(args.vmm.iter().cloned())
        .collect();
    let Some(vmm) = Args::read(command_line.iter().cloned())? else { return Ok(Code::Ok) };
    let home = Home::prepare(&args.chroot_base_dir, &name, &args.id)?;
    let sharing = Sharing::of(&args.shares, &home.path).map_err(JailError::from)?;
    let source = Source::Jail(home.root.as_fd(), &home.path);
    let mut order = read_order(&vmm, &source).map_err(JailError::from)?;
    let around = declare_groups(&args, &name, &mut order)?;
    if sharing.is_some() && order.config.cgroup.driver == Driver::None {
        return Err(JailError::NoStarter.into());
    }
    let nodes = nodes(&order)?;
    let image = Image::open().map_err(JailError::from)?;
    let report = vmm.exit_report.as_deref().map(|path| || sink::open_in(&source, path));
    let founded = Founded::found(&args.id, &order, report, &around).map_err(JailError::from)?;
    let prisoner = Prisoner { args, name, executable, command_line, home, order, nodes, sharing };
    prisoner.part(&image, founded)
}

/// The executable, which is to be ours, and its name.
fn executable(args: &JailArgs) -> Result<(OsString, File), JailError> {
    let failed = |source| JailError::Path { doing: "read --exec-file", path: args.exec_file.clone(), source };
    let path = fs::canonicalize(&args.exec_file).map_err(failed)?;
    if !fs::metadata(&path).map_err(failed)?.is_file() {
        return Err(JailError::NotAFile(path));
    }
    let mut file = File::open(&path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    if memchr::memmem::find(&bytes, MARK.as_bytes()).is_none() {
        return Err(JailError::Foreign(path));
    }
    // A path that ends in a regular file has a name.
    Ok((path.file_name().unwrap_or_default().to_owned(), file))
}

/// When this process began, for the metrics.
fn began() -> [OsString; 4] {
    let us = |clock| {
        let time = rustix::time::clock_gettime(clock);
        OsString::from((time.tv_sec * 1_000_000 + time.tv_nsec / 1000).to_string())
    };
    [
        "--start-time-us".into(),
        us(rustix::time::ClockId::Monotonic),
        "--parent-cpu-time-us".into(),
        us(rustix::time::ClockId::ProcessCPUTime),
    ]
}

/// Takes the jailer's own flags up into what is asked for. Returns what is to be written to the group around ours.
fn declare_groups(
    args: &JailArgs,
    name: &OsStr,
    order: &mut Order,
) -> Result<Vec<(String, String)>, JailError> {
    let section = &mut order.config.cgroup;
    if let Some(version) = args.cgroup_version {
        if ![CgroupVersion::Auto, version].contains(&section.version) {
            return Err(JailError::TwoVersions);
        }
        section.version = version;
    }
    let parent = match &args.parent_cgroup {
        Some(parent) => parent.clone(),
        None if args.cgroups.is_empty() => return Ok(Vec::new()),
        None => name.to_string_lossy().into_owned(),
    };
    if section.parent.is_some() {
        return Err(JailError::TwoParents("parent"));
    }
    if !matches!(section.driver, Driver::Auto | Driver::Cgroupfs) {
        return Err(JailError::TwoParents("driver"));
    }
    section.driver = Driver::Cgroupfs;
    order.cgroups_path = Some(format!("/{parent}/{}", args.id));
    Ok(args.cgroups.clone())
}

/// The devices that the microVM needs, or may need as far as it is known yet.
fn nodes(order: &Order) -> Result<Vec<Node>, JailError> {
    let mut nodes = vec![Node::of_host("/dev/kvm")?.ok_or(JailError::NoDevice("/dev/kvm"))?];
    nodes.extend(Node::of_host("/dev/net/tun")?);
    let interfaces = &order.config.network_interfaces;
    if !order.start || interfaces.iter().any(|interface| interface.vhost != VhostMode::Off) {
        nodes.extend(Node::of_host("/dev/vhost-net")?);
    }
    Ok(nodes)
}

/// All that goes into the jail.
struct Prisoner {
    args: JailArgs,
    name: OsString,
    executable: File,
    command_line: Vec<OsString>,
    home: Home,
    order: Order,
    nodes: Vec<Node>,
    sharing: Option<Sharing>,
}

impl Prisoner {
    /// Goes into the jail, or has a child go and waits until it is there.
    fn part(mut self, image: &Image, founded: Option<Founded>) -> Result<Code, Failure> {
        let call = |doing| move |source| JailError::Call { doing, source };
        // Who leads a group of processes cannot begin a session.
        let leads = rustix::process::getpgrp() == rustix::process::getpid();
        let other = self.args.new_pid_ns || (self.args.daemonize && leads);
        if !other {
            let placement = match founded {
                Some(founded) => {
                    let watch = Watch::ourselves(self.args.id.as_str(), &self.order.filters);
                    let servers = self.sharing.as_ref().map(Sharing::outside);
                    let watch = Watch { quiet: self.args.daemonize, servers, ..watch };
                    founded.settle(image, watch).map_err(JailError::from)?
                }
                None => Placement::Unplaced,
            };
            match self.confine(placement, &mut io::sink())? {}
        }
        let (mut ours, mut theirs) = UnixStream::pair().map_err(call("make a socket pair"))?;
        let ends = Ends::new().map_err(PlacementError::from).map_err(JailError::from)?;
        match fork(self.args.new_pid_ns).map_err(call("make a process"))? {
            Side::Child => {
                drop(ours);
                let mut reaper = [0; 4];
                if theirs.read_exact(&mut reaper).is_err() {
                    // The parent could not go on, and has said so.
                    return Ok(Code::BadConfiguration);
                }
                let placement = match founded {
                    Some(founded) => founded.inherit(ends.into_link(i32::from_ne_bytes(reaper))),
                    None => Placement::Unplaced,
                };
                let failure = match self.confine(placement, &mut theirs) {
                    Ok(never) => match never {},
                    Err(error) => Failure::from(error),
                };
                // For the parent to end with, if it is still there.
                let _ = theirs.write_all(&[failure.code as u8]);
                Err(failure)
            }
            Side::Parent(pid) => {
                drop(theirs);
                // The child removes them where it fails.
                self.home.keep();
                let reaper = match founded {
                    Some(founded) => {
                        let (id, filters) = (self.args.id.as_str(), &self.order.filters);
                        let servers = self.sharing.as_ref().map(Sharing::outside);
                        let quiet = self.args.daemonize;
                        let watch = Watch { id, pid, filters, socket: None, quiet, servers };
                        founded.watch(image, watch, ends).map_err(JailError::from)?
                    }
                    None => 0,
                };
                ours.write_all(&reaper.to_ne_bytes()).map_err(call("tell the process in the jail"))?;
                let mut said = Vec::new();
                ours.read_to_end(&mut said).map_err(call("hear of the process in the jail"))?;
                match said.last() {
                    Some(0) => Ok(Code::Ok),
                    // It has said why.
                    Some(_) => Ok(Code::BadConfiguration),
                    None => Err(Failure {
                        code: Code::Generic,
                        message: "the process for the jail was killed before it was there".to_owned(),
                    }),
                }
            }
        }
    }

    /// Goes into the jail and executes what is there, having told `parent`. If that fails the reaper removes the groups when
    /// this process ends.
    fn confine(mut self, placement: Placement, parent: &mut impl Write) -> Result<Infallible, JailError> {
        let call = |doing| move |source| JailError::Call { doing, source };
        let JailArgs { uid, gid, netns, daemonize, limits, .. } = &self.args;
        // What the host alone can give.
        let mut handed = placement.open_files()?;
        let tasks = walls::tasks()?;
        let pid = fs::read_link("/proc/self").map_err(call("read /proc/self"))?;
        let pid = pid.to_str().and_then(|pid| pid.parse().ok()).unwrap_or_else(std::process::id);
        let huge_pages = memory::has_huge_pages();
        let null = if *daemonize { Some(walls::null()?) } else { None };
        let lock = self.home.root.try_clone().map_err(call("duplicate a descriptor"))?;
        let (shares, starter) = self.sharing.take().map(Sharing::into_inside).unzip();
        let shares = shares.unwrap_or_default();
        handed.extend(inside::named(tasks, lock, starter));

        netns.as_deref().map_or(Ok(()), walls::enter_netns)?;
        let namespace = walls::enter_root(&self.home.path)?;
        self.home.keep();
        let root =
            Root { path: self.home.path.display().to_string(), namespace, groups: Some(lookup::place()) };
        lookup::set_root(Some(root.clone()));
        let furniture = Furniture {
            executable: (&self.name, &self.executable),
            nodes: std::mem::take(&mut self.nodes),
            owner: (*uid, *gid),
            pid,
        };
        let executable = furniture.arrange()?;
        rights::limit(limits)?;
        let facts = Facts { pid, root, huge_pages, shares };
        let parcel = placement.pack(&self.order, handed, Some(facts))?;
        rights::give_up(*uid, *gid)?;
        null.as_ref().map_or(Ok(()), walls::daemonize)?;
        parent.write_all(&[0]).map_err(call("tell who waits"))?;
        Ok(parcel.exec(executable.as_fd(), self.command_line, false)?)
    }
}

#[cfg(test)]
mod tests;
