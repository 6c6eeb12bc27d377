//! A client of Firecracker's as it is published: fctools starts, configures, boots, pauses, resumes and stops a
//! guest, with no word about Pinfold or cgroups.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Group, PATIENCE};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BalloonDevice, BootSource, Drive, LoggerSystem, MachineConfiguration, MetricsSystem, UpdateBalloonDevice,
    UpdateDrive, VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "fctools_by_api",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| run(ctx, InitMethod::ViaApiCalls),
    },
    Case {
        name: "fctools_by_json",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| run(ctx, InitMethod::ViaJsonConfiguration(ctx.scratch.join("fctools.json"))),
    },
];

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

fn run(ctx: &Ctx, init_method: InitMethod) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(life(ctx, init_method))
}

/// For `map_err`.
fn failed<E: Display>(doing: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| Failure(format!("{doing}: {error}"))
}

async fn life(ctx: &Ctx, init_method: InitMethod) -> Result<(), Failure> {
    let mut resources = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let data = declaration(ctx, &mut resources)?;
    let other = ctx.scratch.join("other");
    File::create(&other)?.set_len(2 << 20)?;
    let other = moved(&mut resources, &other)?;
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(ctx.scratch.join("api.sock")));
    let installation = VmmInstallation::new(&ctx.pinfold, &ctx.pinfold, &ctx.pinfold);
    let configuration = VmConfiguration::New { init_method, data };
    let executor = UnrestrictedVmmExecutor::new(arguments);
    let mut vm =
        Vm::prepare(executor, resources, installation, configuration).await.map_err(failed("prepare"))?;
    vm.start(PATIENCE).await.map_err(failed("start"))?;
    check!(vm.get_state() == VmState::Running, "{}", vm.get_state());
    // Where a VM goes that was given no place.
    let home = match Path::new("/run/systemd/system").is_dir() {
        true => Group::at("/machine.slice/pinfold-anonymous-instance.scope"),
        false => Group::at("/pinfold/anonymous-instance"),
    };
    check!(home.child("kata-sandbox").exists()?, "it is in no group of its own");

    let info = vm.get_info().await.map_err(failed("get_info"))?;
    check!(info.id == "anonymous-instance" && info.app_name == "Firecracker", "{info:?}");
    let version = vm.get_firecracker_version().await.map_err(failed("version"))?;
    check!(version == "1.17.0", "version {version}");
    let machine = vm.get_machine_configuration().await.map_err(failed("machine-config"))?;
    check!(machine.vcpu_count == 2 && machine.mem_size_mib == 256, "{machine:?}");
    let balloon = vm.get_balloon_device().await.map_err(failed("balloon"))?;
    check!(balloon.amount_mib == 0 && balloon.deflate_on_oom, "{balloon:?}");
    vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 16 })
        .await
        .map_err(failed("update balloon"))?;
    let update = UpdateDrive { drive_id: "data".to_owned(), block: Some(other), rate_limiter: None };
    vm.update_drive(update).await.map_err(failed("update drive"))?;
    vm.flush_metrics().await.map_err(failed("flush metrics"))?;
    vm.create_mmds_untyped(&serde_json::json!({ "a": 1 })).await.map_err(failed("mmds"))?;
    let metadata = vm.get_mmds_untyped().await.map_err(failed("mmds"))?;
    check!(metadata == serde_json::json!({ "a": 1 }), "{metadata}");

    // A guest that has not come that far does not listen to its keyboard.
    wait_for_guest(&ctx.scratch.join("vsock"))?;
    vm.pause().await.map_err(failed("pause"))?;
    check!(vm.get_state() == VmState::Paused, "{}", vm.get_state());
    vm.resume().await.map_err(failed("resume"))?;
    let action =
        VmShutdownAction { method: VmShutdownMethod::CtrlAltDel, timeout: Some(PATIENCE), graceful: true };
    let outcome = vm.shutdown([action]).await.map_err(|error| {
        let log = std::fs::read_to_string(ctx.scratch.join("log")).unwrap_or_default();
        Failure(format!("shutdown: {error}; pinfold's log:\n{log}"))
    })?;
    check!(outcome.graceful, "{outcome:?}");
    vm.cleanup().await.map_err(failed("cleanup"))?;
    home.wait_gone()
}

/// Waits until the guest answers on its vsock port.
fn wait_for_guest(vsock: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut stream = UnixStream::connect(vsock)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"CONNECT 1024\n")?;
        let mut line = String::new();
        if BufReader::new(stream).read_line(&mut line).is_ok_and(|_| line.starts_with("OK ")) {
            return Ok(());
        }
        check!(Instant::now() < deadline, "the guest does not answer: `{line}`");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn declaration(ctx: &Ctx, resources: &mut Resources) -> Result<VmConfigurationData, Failure> {
    let disk = ctx.scratch.join("data.img");
    File::create(&disk)?.set_len(1 << 20)?;
    let kernel_image = moved(resources, &ctx.vmlinux)?;
    let initrd = Some(moved(resources, &ctx.initramfs)?);
    let made = |resources: &mut Resources, name: &str| {
        let kind = ResourceType::Created(CreatedResourceType::File);
        resources.create_resource(ctx.scratch.join(name), kind).map_err(failed("create_resource"))
    };
    let uds = resources
        .create_resource(ctx.scratch.join("vsock"), ResourceType::Produced)
        .map_err(failed("create_resource"))?;
    Ok(VmConfigurationData {
        boot_source: BootSource {
            kernel_image,
            boot_args: Some("console=ttyS0 quiet reboot=k panic=-1 pinfold.run=hello+vsock+wait".to_owned()),
            initrd,
        },
        drives: vec![Drive {
            drive_id: "data".to_owned(),
            is_root_device: false,
            cache_type: None,
            partuuid: None,
            is_read_only: Some(false),
            block: Some(moved(resources, &disk)?),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        }],
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: 256,
            smt: None,
            track_dirty_pages: None,
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: Some(BalloonDevice {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: None,
            free_page_reporting: None,
        }),
        vsock_device: Some(VsockDevice { guest_cid: 3, uds }),
        logger_system: Some(LoggerSystem { logs: Some(made(resources, "log")?), ..LoggerSystem::default() }),
        metrics_system: Some(MetricsSystem { metrics: made(resources, "metrics")? }),
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: None,
    })
}

fn moved(resources: &mut Resources, path: &Path) -> Result<Resource, Failure> {
    // In place: source and destination are the same.
    let kind = ResourceType::Moved(MovedResourceType::HardLinkedOrCopied);
    resources.create_resource(path, kind).map_err(failed("create_resource"))
}
