//! A VM under test.

use super::{Api, Group, PATIENCE, Tap};
use crate::case::{Ctx, Failure};
use crate::check;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What the guest's init writes before each of its lines.
const GUEST: &str = "pinfold-guest:";

/// A VM to be launched: by default one vCPU, 256 MiB, the Debian kernel as ELF, and an init that says hello
/// and powers off; no disk, no network, no placement.
#[derive(Debug)]
pub struct Machine {
    pinfold: PathBuf,
    config_file: PathBuf,
    config: Value,
    steps: String,
    extra_args: String,
    flags: Vec<OsString>,
    wrapper: Vec<String>,
    doors: Vec<File>,
    silent: bool,
    self_tests: bool,
}

impl Machine {
    /// The default VM.
    pub fn new(ctx: &Ctx) -> Self {
        Self {
            pinfold: ctx.pinfold.clone(),
            config_file: ctx.scratch.join("vm.json"),
            config: json!({
                "boot-source": { "kernel_image_path": ctx.vmlinux, "initrd_path": ctx.initramfs },
                "drives": [],
                "network-interfaces": [],
                "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
                "cgroup": { "driver": "none" },
            }),
            steps: "hello+poweroff".to_owned(),
            extra_args: String::new(),
            flags: Vec::new(),
            wrapper: Vec::new(),
            doors: Vec::new(),
            silent: false,
            self_tests: false,
        }
    }

    /// A VM that takes a moment: 8 MiB, and the small guest (`tests/guest/small.rs`), which does what `words` say.
    pub fn small(ctx: &Ctx, words: &str) -> Result<Self, Failure> {
        let kernel = ctx.scratch.join("small-guest");
        if !kernel.exists() {
            std::fs::write(&kernel, include_bytes!(concat!(env!("OUT_DIR"), "/small-guest")))?;
        }
        let boot = json!({ "kernel_image_path": kernel, "boot_args": words });
        Ok(Self::new(ctx).set("/boot-source", boot).mem_mib(8).silent())
    }

    /// Keeps the configuration and the API's socket in a folder of this name, for one VM of several.
    pub fn named(mut self, name: &str) -> Result<Self, Failure> {
        let folder = self.config_file.with_file_name(name);
        std::fs::create_dir_all(&folder)?;
        self.config_file = folder.join("vm.json");
        Ok(self)
    }

    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.config_file.with_file_name("api.sock")
    }

    /// Boots this kernel.
    pub fn kernel(self, path: &Path) -> Self {
        self.set("/boot-source/kernel_image_path", json!(path))
    }

    /// What the guest's init does, as `hello+blk+wait` (see `tests/guest/init`).
    pub fn steps(mut self, steps: &str) -> Self {
        steps.clone_into(&mut self.steps);
        self
    }

    /// More words for the kernel's command line.
    pub fn boot_args(mut self, words: &str) -> Self {
        self.extra_args.push(' ');
        self.extra_args.push_str(words);
        self
    }

    /// Lets the guest's kernel test its cryptography, as it does unless told otherwise: that is more than half of what it
    /// computes until init runs.
    pub fn with_self_tests(mut self) -> Self {
        self.self_tests = true;
        self
    }

    /// The number of vCPUs.
    pub fn vcpus(self, count: u8) -> Self {
        self.set("/machine-config/vcpu_count", json!(count))
    }

    /// The guest's memory in MiB.
    pub fn mem_mib(self, size: u64) -> Self {
        self.set("/machine-config/mem_size_mib", json!(size))
    }

    /// Adds a disk. The first one added is vda, and so on.
    pub fn drive(self, id: &str, path: &Path, read_only: bool) -> Self {
        let drive = json!({
            "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only,
        });
        self.push("drives", drive)
    }

    /// Adds a network interface on `tap`; the guest's init takes `guest` (`10.0.0.2/24`) and pings `peer`.
    pub fn net(self, tap: &Tap, guest: &str, peer: &str) -> Self {
        let interface = json!({
            "iface_id": "eth0", "host_dev_name": tap.name(), "guest_mac": "06:00:ac:10:00:02",
        });
        self.push("network-interfaces", interface)
            .boot_args(&format!("pinfold.ip={guest} pinfold.peer={peer}"))
    }

    /// The cgroup section.
    pub fn cgroup(self, section: Value) -> Self {
        self.set("/cgroup", section)
    }

    /// Sets any value of the configuration by JSON pointer, making the last member when it is missing.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        if let Some((parent, key)) = pointer.rsplit_once('/')
            && let Some(Value::Object(members)) = self.config.pointer_mut(parent)
        {
            members.insert(key.to_owned(), value);
        }
        self
    }

    /// Adds a flag, or the value of the one before, to the command line.
    pub fn flag(mut self, flag: impl Into<OsString>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Launches by this command and its arguments, which is to execute what comes after them.
    pub fn within(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self
    }

    /// Launches from this cgroup, as a container runtime's daemon would.
    pub fn from_caller(mut self, caller: &Group) -> Result<Self, Failure> {
        self.doors = caller.doors()?;
        Ok(self)
    }

    /// Has a shell launch it after `command`, such as `ulimit -n 24`.
    pub fn limited(self, command: &str) -> Self {
        self.within(&["sh", "-c", &format!("{command}; exec \"$0\" \"$@\"")])
    }

    /// Lets the guest's console go to `fifo`.
    pub fn console_to(self, fifo: &Path) -> Self {
        self.within(&["sh", "-c", &format!("exec \"$0\" \"$@\" >'{}'", fifo.display())])
    }

    /// Does not print the guest's console as it comes.
    pub fn silent(mut self) -> Self {
        self.silent = true;
        self
    }

    /// Writes the JSON file and launches `pinfold --no-api --config-file FILE`.
    pub fn start(self) -> Result<Running, Failure> {
        self.launch(|command| command.arg("--no-api"))
    }

    /// Writes the JSON file and launches `pinfold --api-sock SOCKET --config-file FILE`. Does not wait for the socket.
    pub fn start_with_api(self) -> Result<Running, Failure> {
        let socket = self.socket();
        self.launch(|command| command.arg("--api-sock").arg(socket))
    }

    fn launch(self, api: impl FnOnce(&mut Command) -> &mut Command) -> Result<Running, Failure> {
        std::fs::write(&self.config_file, serde_json::to_vec_pretty(&self.declaration())?)?;
        let mut command = self.command();
        api(&mut command).arg("--config-file").arg(&self.config_file).args(&self.flags);
        Running::spawn(command, self.doors, self.silent)
    }

    /// The same, and waits for the socket.
    pub fn start_and_connect(self) -> Result<(Running, Api), Failure> {
        let socket = self.socket();
        connected(self.start_with_api()?, &socket)
    }

    /// Launches `pinfold --api-sock SOCKET --cgroup JSON` and waits for the socket. Nothing is declared but the
    /// placement; [`Self::declaration`] says what would be.
    pub fn serve(self) -> Result<(Running, Api), Failure> {
        let socket = self.socket();
        let mut command = self.command();
        command.arg("--api-sock").arg(&socket).arg("--cgroup").arg(self.config["cgroup"].to_string());
        command.args(&self.flags);
        connected(Running::spawn(command, self.doors, self.silent)?, &socket)
    }

    /// The configuration as [`Self::start`] would write it.
    pub fn declaration(&self) -> Value {
        let mut config = self.config.clone();
        if config.pointer("/boot-source/boot_args").is_none() {
            config["boot-source"]["boot_args"] = json!(self.boot_args_text());
        }
        config
    }

    fn command(&self) -> Command {
        let Some((first, rest)) = self.wrapper.split_first() else { return Command::new(&self.pinfold) };
        let mut command = Command::new(first);
        command.args(rest).arg(&self.pinfold);
        command
    }

    fn boot_args_text(&self) -> String {
        let self_tests = if self.self_tests { "" } else { " cryptomgr.notests" };
        format!(
            "console=ttyS0 quiet reboot=k panic=-1{self_tests} pinfold.run={}{}",
            self.steps, self.extra_args
        )
    }

    fn push(mut self, list: &str, value: Value) -> Self {
        if let Some(Value::Array(values)) = self.config.get_mut(list) {
            values.push(value);
        }
        self
    }
}

/// Waits for the API's socket.
fn connected(running: Running, socket: &Path) -> Result<(Running, Api), Failure> {
    let api = Api::connect(socket)
        .map_err(|failure| Failure(format!("{failure}; pinfold says: {}", running.errors())))?;
    Ok((running, api))
}

/// The two containers of the design's example, for the section `cgroup`: together 5 CPUs, 5120 shares and 600 MiB.
pub fn containers_of_record() -> Value {
    json!([
        { "id": "cont-2cpu-400m", "resources": {
            "cpu": { "shares": 2048, "quota": 200_000, "period": 100_000 },
            "memory": { "limit": 419_430_400 } } },
        { "id": "cont-3cpu-200m", "resources": {
            "cpu": { "shares": 3072, "quota": 300_000, "period": 100_000 },
            "memory": { "limit": 209_715_200 } } },
    ])
}

/// A launched VM. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    console: Arc<Stream>,
    errors: Arc<Stream>,
}

impl Running {
    /// Starts `command` with piped standard streams, inside the group whose `doors` are given.
    pub fn spawn(mut command: Command, doors: Vec<File>, silent: bool) -> Result<Self, Failure> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only `write` on descriptors opened before is called, which is
        // async-signal-safe; the closure owns them.
        unsafe {
            command.pre_exec(move || {
                for door in &doors {
                    if libc::write(door.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut child =
            command.spawn().map_err(|error| Failure(format!("cannot launch {command:?}: {error}")))?;
        let console = Stream::follow(child.stdout.take(), "guest", silent);
        let errors = Stream::follow(child.stderr.take(), "pinfold", silent);
        Ok(Self { child, console, errors })
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the console shows a line that holds `text`, and returns the line.
    pub fn wait_for_line(&self, text: &str) -> Result<String, Failure> {
        self.console.wait_for(text, PATIENCE).ok_or_else(|| {
            let how = if self.console.closed() {
                "before its console closed".to_owned()
            } else {
                format!("within {} s", PATIENCE.as_secs())
            };
            Failure(format!(
                "the guest did not print `{text}` {how}; its console:\n{}\nstandard error:\n{}",
                self.console(),
                self.errors()
            ))
        })
    }

    /// Waits for a line of the guest's init that starts with `text`, and returns what follows its mark.
    pub fn wait_for_guest(&self, text: &str) -> Result<String, Failure> {
        let line = self.wait_for_line(&format!("{GUEST} {text}"))?;
        Ok(line.split_once(GUEST).map(|(_, rest)| rest.trim().to_owned()).unwrap_or_default())
    }

    /// Types a line on the guest's console.
    pub fn send_line(&mut self, line: &str) -> Result<(), Failure> {
        let Some(stdin) = &mut self.child.stdin else { return Err(Failure::new("standard input is closed")) };
        stdin.write_all(format!("{line}\n").as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Gives the waiting guest an order that it answers with one line, and returns that.
    pub fn ask(&mut self, order: &str) -> Result<String, Failure> {
        // A tag tells this answer from earlier ones.
        let tag = format!("#{} ", format!("{:?}", Instant::now()).replace(|c: char| !c.is_ascii_digit(), ""));
        self.send_line(&format!("{tag}{order}"))?;
        let line = self.wait_for_guest(&tag)?;
        Ok(line.strip_prefix(tag.as_str()).unwrap_or_default().to_owned())
    }

    /// Has the waiting guest send a line over vsock to the host, by the device's socket, and sends one back.
    pub fn talk_over_vsock(&mut self, socket: &Path) -> Result<(), Failure> {
        let listener = UnixListener::bind(format!("{}_77", socket.display()))?;
        self.send_line("send 77 hello from the guest")?;
        let (mut stream, _) = listener.accept()?;
        let mut said = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut said)?;
        check!(said == "hello from the guest\n", "the guest said {said:?}");
        stream.write_all(b"hello back\n")?;
        self.wait_for_guest("answer hello back")?;
        Ok(())
    }

    /// Asks the waiting guest for its counters of I/O so far: their sum, in sectors and packets.
    pub fn guest_io(&mut self) -> Result<u64, Failure> {
        let line = self.ask("io")?;
        let count = line.split(' ').next_back().and_then(|word| word.parse().ok());
        count.ok_or_else(|| Failure(format!("the guest said `{line}`")))
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: libc::c_int) -> Result<(), Failure> {
        let pid = libc::pid_t::try_from(self.pid())?;
        // SAFETY: kill touches no memory; the process is a child that we have not waited for.
        if unsafe { libc::kill(pid, signal) } == 0 {
            return Ok(());
        }
        Err(Failure(format!("cannot signal {pid}: {}", std::io::Error::last_os_error())))
    }

    /// Waits for the VMM's end.
    pub fn wait_exit(&mut self) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(Failure(format!(
            "pinfold was still running after {} s; the console:\n{}",
            PATIENCE.as_secs(),
            self.console()
        )))
    }

    /// Waits for the VMM's end, which must be this exit code.
    pub fn expect_exit(&mut self, code: i32) -> Result<(), Failure> {
        let status = self.wait_exit()?;
        if status.code() == Some(code) {
            return Ok(());
        }
        let how = match status.signal() {
            Some(signal) => format!("by signal {signal}"),
            None => format!("with exit code {:?}", status.code()),
        };
        Err(Failure(format!("pinfold ended {how}, not {code}; standard error:\n{}", self.errors())))
    }

    /// Waits until standard error is closed: then nobody is left who could still remove something of the VM.
    pub fn wait_errors_closed(&self) -> Result<(), Failure> {
        if self.errors.wait_closed(PATIENCE) {
            return Ok(());
        }
        Err(Failure(format!("standard error was still open after {} s", PATIENCE.as_secs())))
    }

    /// All that the guest printed so far.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// All that the VMM wrote to standard error so far.
    pub fn errors(&self) -> String {
        self.errors.text()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already, and then both fail.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Output collected by a thread.
#[derive(Debug, Default)]
struct Stream {
    collected: Mutex<Collected>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct Collected {
    text: String,
    closed: bool,
}

impl Stream {
    fn follow(source: Option<impl Read + Send + 'static>, name: &'static str, silent: bool) -> Arc<Self> {
        let stream = Arc::new(Self::default());
        let Some(mut source) = source else { return stream };
        let shared = Arc::clone(&stream);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            // What is not shown yet: a line whose end is still to come.
            let mut begun = String::new();
            let show = |line: &str| {
                if !silent && !line.is_empty() {
                    println!("{name}| {line}");
                }
            };
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                let chunk = String::from_utf8_lossy(&buffer[..count]).replace('\r', "");
                begun.push_str(&chunk);
                while let Some(end) = begun.find('\n') {
                    show(&begun[..end]);
                    begun.drain(..=end);
                }
                shared.update(|collected| collected.text.push_str(&chunk));
            }
            show(&begun);
            shared.update(|collected| collected.closed = true);
        });
        stream
    }

    fn update(&self, change: impl FnOnce(&mut Collected)) {
        // A poisoned lock still holds good text.
        change(&mut self.collected.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        self.grown.notify_all();
    }

    fn text(&self) -> String {
        self.collected.lock().unwrap_or_else(std::sync::PoisonError::into_inner).text.clone()
    }

    fn closed(&self) -> bool {
        self.collected.lock().unwrap_or_else(std::sync::PoisonError::into_inner).closed
    }

    /// Whether the stream ends before `timeout` has passed.
    fn wait_closed(&self, timeout: Duration) -> bool {
        let collected = self.collected.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (collected, _) = self
            .grown
            .wait_timeout_while(collected, timeout, |collected| !collected.closed)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        collected.closed
    }

    /// The first finished line that holds `wanted`; none when the stream ends or `timeout` passes before.
    fn wait_for(&self, wanted: &str, timeout: Duration) -> Option<String> {
        let find = |collected: &Collected| {
            let finished = match collected.text.rfind('\n') {
                _ if collected.closed => collected.text.len(),
                Some(end) => end,
                None => 0,
            };
            collected.text[..finished].lines().find(|line| line.contains(wanted)).map(str::to_owned)
        };
        let collected = self.collected.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (collected, _) = self
            .grown
            .wait_timeout_while(collected, timeout, |collected| {
                !collected.closed && find(collected).is_none()
            })
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        find(&collected)
    }
}
