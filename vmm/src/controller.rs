//! What is asked of the microVM, done: the one place where actions meet what is there.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ::devices::legacy::ExitSignal;
use ::devices::mmds::{Mmds, MmdsError};
use api_server::Responder;
use resources::{Action, Fault, MicrovmConfig, Outcome, Reply, VmState};
use serde_json::{Value, json};

use crate::cgroup_live::LiveGroups;
use crate::devices::configure_mmds;
use crate::event_loop::EventLoop;
use crate::exit::chain;
use crate::files::{self, Kind};
use crate::machine::{Machine, MachineError, Options};
use crate::metrics::{self, METRICS};
use crate::placement::Placement;
use crate::{observability, threads, version, virtiofsd};

/// The declared microVM, and the running one when it was started.
pub struct Controller<'a> {
    options: Options,
    config: MicrovmConfig,
    mmds: Arc<Mutex<Mmds>>,
    placement: &'a Placement,
    /// `None` where the threads stay where they were started.
    groups: Option<LiveGroups>,
    exit: Arc<ExitSignal>,
    machine: Option<Machine>,
}

impl<'a> Controller<'a> {
    /// A microVM that was declared so far as `config` says, and not started.
    pub fn new(
        options: Options,
        config: MicrovmConfig,
        mmds: Mmds,
        placement: &'a Placement,
        groups: Option<LiveGroups>,
        exit: Arc<ExitSignal>,
    ) -> Self {
        Self { options, config, mmds: Arc::new(Mutex::new(mmds)), placement, groups, exit, machine: None }
    }

    /// Does what its time has come for. To be called after each turn of the event loop.
    pub fn tend(&mut self) {
        if let Some(groups) = &mut self.groups {
            groups.tend();
        }
    }

    /// Does what is asked, and answers at once, but for who wants to wait.
    pub fn answer(&mut self, action: Action, responder: Responder, event_loop: &mut EventLoop) {
        match (&action, &mut self.groups) {
            (Action::GetCgroupEvents(query), Some(groups)) => groups.tell(*query, responder),
            (Action::GetCgroupDiagnosis(query), Some(groups)) => groups.diagnose(*query, responder),
            (Action::GetCgroupWhatIf(query), Some(groups)) => groups.what_if((**query).clone(), responder),
            _ => responder.send(self.handle(action, event_loop)),
        }
    }

    /// Does what is asked. A refusal changes nothing.
    fn handle(&mut self, action: Action, event_loop: &mut EventLoop) -> Outcome {
        action.check_phase(self.machine.is_some()).map_err(fault)?;
        match action {
            Action::GetInstance => Ok(Reply::Json(self.instance())),
            Action::GetVersion => Ok(Reply::Json(json!({ "firecracker_version": version::FIRECRACKER }))),
            Action::GetConfig => json(&self.config),
            Action::GetMachineConfig => json(&self.config.machine_config),
            Action::GetBalloon => json(self.config.balloon.as_ref().ok_or_else(no_balloon)?),
            Action::GetBalloonStats => self.balloon_stats(),
            Action::GetMmds => Ok(Reply::Json(self.mmds().get())),
            Action::PutMmds(value) => self.mmds().put(value).map_err(mmds_fault).map(|()| Reply::Done),
            Action::PatchMmds(value) => self.mmds().patch(value).map_err(mmds_fault).map(|()| Reply::Done),
            Action::GetCgroup => Ok(Reply::Json(self.cgroup()?)),
            Action::GetCgroupThreads => {
                let threads = threads::scan(self.placement.groups(), &self.placement.others());
                METRICS.cgroup.strays.store(threads.strays.len() as u64);
                json(&threads)
            }
            Action::GetCgroupStats => {
                let stats = self.groups.as_ref().ok_or_else(no_groups)?.stats();
                stats.map(Reply::Json).map_err(fault)
            }
            Action::GetPrometheus => self.groups.as_ref().ok_or_else(no_groups)?.prometheus().map_err(fault),
            Action::GetCgroupEvents(_) | Action::GetCgroupDiagnosis(_) | Action::GetCgroupWhatIf(_) => {
                Err(no_groups())
            }
            action @ (Action::PutCgroup(_)
            | Action::PatchCgroup(_)
            | Action::PatchOverhead(_)
            | Action::PutContainer(_)
            | Action::DeleteContainer(_)) => self.limit(action),
            Action::Start => self.start(event_loop).map_err(fault).map(|()| Reply::Done),
            Action::SetVmState(state) => self.set_state(state),
            // As with Firecracker it is done when nobody asked for metrics, too.
            Action::FlushMetrics => metrics::flush().map_err(fault).map(|_| Reply::Done),
            Action::SendCtrlAltDel => match &self.machine {
                Some(machine) => machine.devices().press_ctrl_alt_del().map_err(fault).map(|()| Reply::Done),
                None => Ok(Reply::Done),
            },
            action => self.declare(action),
        }
    }

    /// Builds what was declared and runs it. If that fails everything is as before.
    pub fn start(&mut self, event_loop: &mut EventLoop) -> Result<(), MachineError> {
        let pins = self.config.pinning()?;
        if let Some(config) = &self.config.mmds_config {
            configure_mmds(&mut self.mmds(), config);
        }
        let machine =
            Machine::build(&self.options, &self.config, &self.mmds, self.placement, event_loop, &self.exit)?;
        for interface in &mut self.config.network_interfaces {
            interface.backend = machine.devices().net_backend(&interface.iface_id);
        }
        self.machine = Some(machine);
        pin(pins.as_ref());
        Ok(())
    }

    /// Stops the guest and takes the machine apart.
    pub fn end(self) {
        drop(self.machine);
    }

    /// Takes up a declaration once what it is about has followed.
    fn declare(&mut self, action: Action) -> Outcome {
        let mut config = self.config.clone();
        config.apply(action.clone()).map_err(fault)?;
        match &self.machine {
            Some(machine) => machine.devices().follow(&action).map_err(fault)?,
            None => self.prepare(&action)?,
        }
        self.config = config;
        Ok(Reply::Done)
    }

    /// Takes up other limits once the groups have them.
    fn limit(&mut self, action: Action) -> Outcome {
        let mut config = self.config.clone();
        config.apply(action).map_err(fault)?;
        // Before the start there may be no vCPUs yet to count.
        let pins = if self.machine.is_some() { config.pinning().map_err(fault)? } else { None };
        self.groups.as_mut().ok_or_else(no_groups)?.follow(&config.cgroup).map_err(fault)?;
        pin(pins.as_ref());
        self.config = config;
        Ok(Reply::Done)
    }

    /// What a declaration has an effect on before the start.
    fn prepare(&self, action: &Action) -> Result<(), Fault> {
        match action {
            Action::PutLogger(logger) => observability::configure_log(logger).map_err(fault),
            Action::PutMetrics(section) => {
                observability::configure_metrics(section, &self.options.id).map_err(fault)
            }
            // Found out now, when whoever declares it can still mend it.
            Action::PutBootSource(source) => {
                can_open("boot-source.kernel_image_path", Kind::File, Some(&source.kernel_image_path))?;
                can_open("boot-source.initrd_path", Kind::File, source.initrd_path.as_deref())
            }
            Action::PutDrive(drive) => {
                can_open("drives.path_on_host", Kind::Disk, drive.path_on_host.as_deref())
            }
            Action::PutFs(fs) => fs.shared_dir.as_deref().map_or(Ok(()), virtiofsd::check).map_err(fault),
            _ => Ok(()),
        }
    }

    fn set_state(&mut self, state: VmState) -> Outcome {
        let Some(machine) = &mut self.machine else { return Ok(Reply::Done) };
        let start = Instant::now();
        match state {
            VmState::Paused => {
                machine.pause().map_err(fault)?;
                METRICS.latencies_us.pause_vm.store_since(start);
            }
            VmState::Resumed => {
                machine.resume().map_err(fault)?;
                METRICS.latencies_us.resume_vm.store_since(start);
            }
        }
        Ok(Reply::Done)
    }

    fn balloon_stats(&self) -> Outcome {
        if self.config.balloon.is_none() {
            return Err(no_balloon());
        }
        let stats = self.machine.as_ref().map(|machine| machine.devices().balloon_stats()).transpose();
        stats.map_err(fault)?.flatten().map(Reply::Json).ok_or_else(|| {
            "the balloon has no statistics: set its stats_polling_interval_s before the start"
                .to_owned()
                .into()
        })
    }

    fn mmds(&self) -> std::sync::MutexGuard<'_, Mmds> {
        self.mmds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn instance(&self) -> Value {
        let state = match &self.machine {
            None => "Not started",
            Some(machine) if machine.is_paused() => "Paused",
            Some(_) => "Running",
        };
        json!({
            "id": self.options.id.as_str(),
            "state": state,
            "vmm_version": version::FIRECRACKER,
            "app_name": "Firecracker",
            "pinfold_version": version::PINFOLD,
        })
    }

    /// The section as declared, and what came of it.
    fn cgroup(&self) -> Result<Value, Fault> {
        let mut value = serde_json::to_value(&self.config.cgroup).map_err(fault)?;
        let in_force = self.groups.as_ref().map(LiveGroups::in_force).transpose().map_err(fault)?;
        if let Value::Object(members) = &mut value {
            members.insert("in_force".to_owned(), in_force.unwrap_or(Value::Null));
        }
        Ok(value)
    }
}

/// Pins the vCPU threads, which run all the same where that fails.
fn pin(cpus: Option<&cgroup::CpuSet>) {
    if let Some(cpus) = cpus
        && let Err(error) = threads::pin_vcpus(cpus)
    {
        log::error!("cannot pin the vCPUs to the CPUs {cpus}: {error}");
    }
}

fn can_open(field: &'static str, kind: Kind, path: Option<&Path>) -> Result<(), Fault> {
    path.map_or(Ok(()), |path| files::open(field, path, kind).map(drop)).map_err(fault)
}

fn mmds_fault(error: MmdsError) -> Fault {
    Fault { too_large: matches!(error, MmdsError::TooLarge { .. }), message: chain(&error) }
}

fn json(value: &impl serde::Serialize) -> Outcome {
    serde_json::to_value(value).map(Reply::Json).map_err(fault)
}

fn fault(error: impl std::error::Error) -> Fault {
    chain(&error).into()
}

fn no_balloon() -> Fault {
    "there is no balloon: PUT /balloon before the start".to_owned().into()
}

fn no_groups() -> Fault {
    "there are no groups of ours, as the section cgroup has \"driver\": \"none\"; launch without it"
        .to_owned()
        .into()
}
