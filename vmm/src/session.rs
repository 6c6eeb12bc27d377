//! A process's life once it is in its place: it serves the API and the guest until either ends it.

use std::sync::Arc;

use ::devices::legacy::{ExitKind, ExitSignal};
use ::devices::mmds::Mmds;
use resources::{Metrics, MicrovmConfig};

use crate::api::Api;
use crate::args::Args;
use crate::cgroup_live::LiveGroups;
use crate::controller::Controller;
use crate::event_loop::{End, EventLoop};
use crate::exit::{Code, Failure};
use crate::machine::Options;
use crate::metrics::{FlushTimer, METRICS};
use crate::observability;
use crate::placement::{Order, Placement};
use crate::signals::StopSignals;

/// Serves until the end. The calling thread is in its cgroup, and so will be every thread that is made here.
pub fn run(args: &Args, order: Order, placement: &Placement) -> Result<Code, Failure> {
    // Before any thread is made, so that no thread takes these signals.
    let signals = StopSignals::block().map_err(|error| Failure {
        code: Code::Generic,
        message: format!("cannot block signals: {error}"),
    })?;
    placement.count();
    observe(args, &order.config)?;
    let exit = ExitSignal::new().map(Arc::new).map_err(|error| Failure::generic(&error))?;
    let mut event_loop =
        EventLoop::new(signals, Arc::clone(&exit)).map_err(|error| Failure::generic(&error))?;
    event_loop.add(FlushTimer::new().map_err(|error| Failure::generic(&error))?);
    let api = match args.no_api {
        true => None,
        false => Some(
            Api::start(args, &order.filters, &mut event_loop)
                .map_err(|error| Failure::configuration(&error))?,
        ),
    };
    let mut mmds = Mmds::new(args.mmds_limit());
    if let Some(metadata) = order.metadata {
        mmds.put(metadata).map_err(|error| Failure::configuration(&error))?;
    }
    let options = Options {
        id: args.id.clone(),
        boot_timer: args.boot_timer,
        enable_pci: args.enable_pci,
        filters: order.filters,
    };
    let groups =
        LiveGroups::of(placement, &mut event_loop).map_err(|error| Failure::configuration(&error))?;
    let mut controller = Controller::new(options, order.config, mmds, placement, groups, exit);
    if order.start {
        controller.start(&mut event_loop).map_err(|error| Failure::configuration(&error))?;
    }
    let end = loop {
        if let Some(end) = event_loop.turn().map_err(|error| Failure::generic(&error))? {
            break end;
        }
        while let Some((action, responder)) = api.as_ref().and_then(Api::next) {
            controller.answer(action, responder, &mut event_loop);
        }
        controller.tend();
    };
    controller.end();
    match end {
        End::Guest(ExitKind::Error(message)) => Err(Failure { code: Code::Generic, message }),
        End::Guest(kind) => {
            log::info!("the guest ended: {kind:?}");
            Ok(Code::Ok)
        }
        End::Signal(libc::SIGHUP) => Ok(Code::Hangup),
        End::Signal(signal) => {
            log::info!("stopped by signal {signal}");
            Ok(Code::Ok)
        }
    }
}

/// Sets up the log and the metrics: what the configuration declares goes before the command line.
fn observe(args: &Args, config: &MicrovmConfig) -> Result<(), Failure> {
    observability::configure_log_by(args).map_err(|error| Failure::configuration(&error))?;
    if let Some(section) = &config.logger {
        observability::configure_log(section).map_err(|error| Failure::configuration(&error))?;
    }
    METRICS.note_start(args.start_time_us, args.start_time_cpu_us, args.parent_cpu_time_us);
    let section = args.metrics_path.clone().map(|metrics_path| Metrics {
        metrics_path,
        emit_id: false,
        properties: None,
    });
    for section in section.iter().chain(&config.metrics) {
        observability::configure_metrics(section, &args.id)
            .map_err(|error| Failure::configuration(&error))?;
    }
    Ok(())
}
