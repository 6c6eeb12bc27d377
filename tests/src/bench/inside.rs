//! The measuring side: who runs when.

use super::figures::{FigureId, Group};
use super::guest::Guest;
use super::options::{MARK, Message, OPTIONS_FILE, Options, Sample};
use super::vmm::{ALL, Devices, Place, Vmm};
use super::{disk, net, service, start};
use crate::case::{Case, Ctx, Failure, Needs};
use crate::lab::Tap;
use std::time::Duration;

/// The bench as the host's agent runs it. It is no test of its own.
pub const BENCH: Case = Case { name: "bench", needs: Needs::VM, timeout: Duration::from_secs(6 * 3600), run };

/// Where measurements go.
pub struct Sink {
    /// Whether the clock counts instructions.
    pub counting: bool,
}

impl Sink {
    /// A figure of `vmm`, in the figure's unit, and the share of its interval that was idle.
    pub fn sample(&self, vmm: &Vmm, figure: FigureId, value: f64, idle: Option<f64>) {
        self.send(&Message::Sample(Sample { vmm: vmm.name.to_owned(), figure, value, idle }));
    }

    fn unavailable(&self, vmm: &Vmm, group: Option<Group>, failure: Failure) {
        self.send(&Message::Unavailable { vmm: vmm.name.to_owned(), group, reason: failure.0 });
    }

    #[expect(clippy::unused_self, reason = "whoever has a sink may send")]
    fn send(&self, message: &Message) {
        // These types always serialise.
        println!("{MARK}{}", serde_json::to_string(message).unwrap_or_default());
    }
}

fn run(ctx: &Ctx) -> Result<(), Failure> {
    let job = ctx.pinfold.parent().ok_or_else(|| Failure::new("the job has no folder"))?;
    let options: Options = serde_json::from_str(&crate::lab::read(&job.join(OPTIONS_FILE))?)?;
    let place = Place { ctx, job };
    let sink = Sink { counting: options.counting };
    let wanted = |vmm: &Vmm| options.only.is_empty() || options.only.iter().any(|name| name == vmm.name);
    let groups = |vmm: &Vmm| -> Vec<Group> {
        options.groups.iter().copied().filter(|group| vmm.groups.contains(group)).collect()
    };
    let vmms: Vec<&Vmm> = ALL.iter().filter(|vmm| wanted(vmm) && !groups(vmm).is_empty()).collect();

    let disk = ctx.scratch.join("disk");
    if options.groups.iter().any(|group| *group != Group::Boot) {
        disk::make(&disk)?;
    }
    let devices = Devices { disk, tap: "pfbench0".to_owned() };
    let runs = usize::try_from(options.runs)?;
    let mut of = vmms.len() + runs * vmms.iter().map(|vmm| groups(vmm).len()).sum::<usize>();
    let mut done = 0;
    // A first launch of each fills the page cache, and shows who cannot be measured.
    let mut able = Vec::new();
    for vmm in vmms {
        sink.send(&Message::Step { done, of, what: format!("{}: first launch", vmm.name) });
        done += 1;
        match try_out(vmm, &place, &devices, &groups(vmm)) {
            Ok(()) => able.push(vmm),
            Err(failure) => {
                of -= runs * groups(vmm).len();
                sink.unavailable(vmm, None, failure);
            }
        }
    }
    for run in 1..=runs {
        for vmm in &able {
            // One VM works for all groups, until one of them fails.
            let mut working = None;
            for group in groups(vmm) {
                let what = format!("{}: {} ({run} of {runs})", vmm.name, group.title());
                sink.send(&Message::Step { done, of, what });
                done += 1;
                if let Err(failure) = measure(vmm, group, &place, &devices, &mut working, &sink) {
                    working = None;
                    sink.unavailable(vmm, Some(group), failure);
                }
            }
            if let Some(working) = working {
                working.guest.stop()?;
            }
        }
    }
    sink.send(&Message::Step { done, of, what: "done".to_owned() });
    Ok(())
}

/// Boots `vmm` as it is going to be measured.
fn try_out(vmm: &Vmm, place: &Place, devices: &Devices, groups: &[Group]) -> Result<(), Failure> {
    let (boots, works) = (groups.contains(&Group::Boot), groups.iter().any(|group| *group != Group::Boot));
    if boots {
        let mut guest = Guest::launch(vmm.small(place)?, &place.ctx.scratch)?;
        guest.wait_for("bench: ready")?;
        guest.stop()?;
    }
    if works {
        Working::launch(vmm, place, devices)?.guest.stop()?;
    }
    Ok(())
}

/// A VM that works, and its end of the network. The VM ends first.
struct Working {
    guest: Guest,
    _tap: Tap,
}

impl Working {
    fn launch(vmm: &Vmm, place: &Place, devices: &Devices) -> Result<Self, Failure> {
        let tap = Tap::create(&devices.tap, net::HOST)?;
        let mut guest = Guest::launch(vmm.working(place, devices)?, &place.ctx.scratch)?;
        guest.wait_for("bench: ready")?;
        Ok(Self { guest, _tap: tap })
    }
}

fn measure(
    vmm: &Vmm,
    group: Group,
    place: &Place,
    devices: &Devices,
    working: &mut Option<Working>,
    sink: &Sink,
) -> Result<(), Failure> {
    if group == Group::Boot {
        return start::measure(vmm, place, sink);
    }
    let guest = match working {
        Some(working) => &mut working.guest,
        None => &mut working.insert(Working::launch(vmm, place, devices)?).guest,
    };
    match group {
        Group::Boot => Ok(()),
        Group::Net => net::measure(vmm, guest, sink),
        Group::Blk => disk::measure(vmm, guest, sink),
        Group::Vsock => service::measure_vsock(vmm, place, guest, sink),
        Group::Api => service::measure_api(vmm, place, sink),
    }
}
