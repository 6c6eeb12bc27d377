//! The folder that is a jail's root: `BASE/NAME/ID/root`.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use resources::InstanceId;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, StatVfsMountFlags};

use super::JailError;

/// Folders of a jail that belong to its user: sockets and other files of the microVM's may be made in them.
const FOLDERS: [&str; 4] = ["/", "/dev", "/dev/net", "/run"];

/// The jail's root, as long as nobody else uses it.
#[derive(Debug)]
pub struct Home {
    /// Where it is on the host.
    pub path: PathBuf,
    /// It is locked by this descriptor, wherever that goes.
    pub root: OwnedFd,
    /// Folders that were made here, outermost first, for as long as they are not in use.
    made: Vec<PathBuf>,
}

impl Home {
    /// Makes what is missing of the folder, and takes it for ourselves.
    pub fn prepare(base: &Path, name: &OsStr, id: &InstanceId) -> Result<Self, JailError> {
        if !base.is_absolute() {
            return Err(JailError::Relative(base.to_owned()));
        }
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| JailError::Path { doing, path, source }
        };
        if !fs::metadata(base).map_err(failed("use --chroot-base-dir", base))?.is_dir() {
            return Err(failed("use --chroot-base-dir", base)(ErrorKind::NotADirectory.into()));
        }
        let mut path = base.to_owned();
        let mut made = Made(Vec::new());
        for part in [name, OsStr::new(id.as_str()), OsStr::new("root")] {
            path.push(part);
            match DirBuilder::new().mode(0o755).create(&path) {
                Ok(()) => made.0.push(path.clone()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("make the folder", &path)(error)),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &path, flags, Mode::empty())
            .map_err(|error| failed("open the jail", &path)(error.into()))?;
        match rustix::fs::flock(&root, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(JailError::InUse(path)),
            Err(error) => return Err(failed("lock the jail", &path)(error.into())),
        }
        let flags =
            rustix::fs::fstatvfs(&root).map_err(|error| failed("look at", &path)(error.into()))?.f_flag;
        for (flag, word) in [
            (StatVfsMountFlags::RDONLY, "read-only"),
            (StatVfsMountFlags::NODEV, "nodev"),
            (StatVfsMountFlags::NOEXEC, "noexec"),
        ] {
            if flags.contains(flag) {
                return Err(JailError::MountOption { path, word });
            }
        }
        Ok(Self { path, root, made: std::mem::take(&mut made.0) })
    }

    /// From now on the folders are somebody's.
    pub fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        drop(Made(std::mem::take(&mut self.made)));
    }
}

/// Folders that are removed when it is dropped, if they are empty.
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// A device node.
#[derive(Debug)]
pub struct Node {
    path: &'static str,
    device: u64,
}

impl Node {
    /// That of the host at this path; `None` where the host has none.
    pub fn of_host(path: &'static str) -> Result<Option<Self>, JailError> {
        match fs::metadata(path) {
            Ok(data) if data.file_type().is_char_device() => Ok(Some(Self { path, device: data.rdev() })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JailError::Path { doing: "look at", path: path.into(), source }),
        }
    }

    /// Makes it, for this user. One of another microVM's in the same jail is used.
    fn make(&self, uid: u32, gid: u32) -> io::Result<()> {
        let there = fs::symlink_metadata(self.path)
            .is_ok_and(|data| data.file_type().is_char_device() && data.rdev() == self.device);
        if !there {
            remove(self.path.as_ref())?;
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(CWD, self.path, FileType::CharacterDevice, mode, self.device)?;
        }
        lchown(self.path, Some(uid), Some(gid))
    }
}

/// What is put into a jail.
#[derive(Debug)]
pub struct Furniture<'a> {
    /// The executable, and its name.
    pub executable: (&'a OsStr, &'a File),
    /// Device nodes.
    pub nodes: Vec<Node>,
    /// Whom the folders and nodes belong to.
    pub owner: (u32, u32),
    /// What the PID file says.
    pub pid: u32,
}

impl Furniture<'_> {
    /// Puts everything where it belongs, in the root of this process, which is the jail's: links lead nowhere else. What is
    /// there of an earlier microVM is replaced. Returns the executable, open for reading.
    pub fn arrange(&self) -> Result<File, JailError> {
        let (uid, gid) = self.owner;
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| JailError::Path { doing, path, source }
        };
        for folder in FOLDERS {
            let made = match DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
                _ => Ok(()),
            };
            made.and_then(|()| fs::set_permissions(folder, Permissions::from_mode(0o700)))
                .and_then(|()| lchown(folder, Some(uid), Some(gid)))
                .map_err(failed("make the folder", folder.as_ref()))?;
        }
        for node in &self.nodes {
            node.make(uid, gid).map_err(failed("make the device", node.path.as_ref()))?;
        }
        let (name, mut executable) = self.executable;
        let path = Path::new("/").join(name);
        let copied = remove(&path).and_then(|()| {
            let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path)?;
            io::Seek::rewind(&mut executable)?;
            io::copy(&mut executable, &mut copy)?;
            drop(copy);
            File::open(&path)
        });
        let executable = copied.map_err(failed("copy the executable to", &path))?;
        let mut pid_file = path.into_os_string();
        pid_file.push(".pid");
        let path = Path::new(&pid_file);
        remove(path)
            .and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o644).open(path))
            .and_then(|mut file| file.write_all(self.pid.to_string().as_bytes()))
            .map_err(failed("write", path))?;
        Ok(executable)
    }
}

/// Removes a file, or nothing.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::chain;

    fn prepare(base: &Path) -> Result<Home, String> {
        Home::prepare(base, OsStr::new("pinfold"), &"vm-1".parse().unwrap()).map_err(|error| chain(&error))
    }

    #[test]
    fn a_jail_is_made_once_and_leaves_nothing_that_nobody_uses() {
        let base = tempfile::tempdir().unwrap();
        let mut home = prepare(base.path()).unwrap();
        assert_eq!(home.path, base.path().join("pinfold/vm-1/root"));
        let error = prepare(base.path()).unwrap_err();
        assert!(error.contains("in use") && error.contains("vm-1/root"), "{error}");
        home.keep();
        drop(home);
        // One that is there is taken as it is.
        drop(prepare(base.path()).unwrap());
        assert!(base.path().join("pinfold/vm-1/root").is_dir());
        fs::remove_dir_all(base.path().join("pinfold")).unwrap();
        drop(prepare(base.path()).unwrap());
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_base_that_will_not_do_is_named() {
        let base = tempfile::tempdir().unwrap();
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        let missing = base.path().join("missing");
        for (bad, word) in [
            (Path::new("jails"), "absolute"),
            (&file, "ot a directory"),
            (&missing, "No such file"),
            (Path::new("/proc"), "/proc/pinfold"),
        ] {
            let error = prepare(bad).unwrap_err();
            assert!(error.contains(bad.to_str().unwrap()) && error.contains(word), "{error}");
        }
        // A link in the root's place would lead elsewhere.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::create_dir_all(base.path().join("pinfold/vm-1")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), base.path().join("pinfold/vm-1/root")).unwrap();
        assert!(prepare(base.path()).unwrap_err().contains("open the jail"));
    }
}
