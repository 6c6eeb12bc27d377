//! Samples turned into tables.

use super::clock::median;
use super::figures::{Better, FIGURES, Figure, FigureId, Group};
use super::options::{Options, Sample};
use super::vmm;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where.
    host: String,
    /// Whether the clock counted instructions.
    counting: bool,
    /// How often.
    runs: u32,
    groups: Vec<Group>,
    unavailable: Vec<String>,
    results: Vec<Result>,
    samples: Vec<Sample>,
}

/// A figure of a VMM.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Result {
    /// The VMM.
    pub vmm: &'static str,
    /// The figure.
    pub figure: FigureId,
    /// The median of all runs.
    pub median: f64,
    /// The largest less the smallest, as a part of the median.
    pub spread: f64,
    /// The median share of idle time, where it is known.
    pub idle: Option<f64>,
}

impl Report {
    /// Nothing measured yet.
    pub fn new(options: &Options, host: &str) -> Self {
        Self {
            host: host.to_owned(),
            counting: options.counting,
            runs: options.runs,
            groups: options.groups.clone(),
            unavailable: Vec::new(),
            results: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// Takes a measurement.
    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
        self.results = self.calculate();
    }

    /// Takes note of what could not be measured, once.
    pub fn unavailable(&mut self, text: String) {
        if !self.unavailable.contains(&text) {
            self.unavailable.push(text);
        }
    }

    /// The host ended before all was done.
    pub fn cut_short(&mut self, reason: String) {
        self.unavailable(format!("cut short: {reason}"));
    }

    /// Whether there is anything to report.
    pub fn has_samples(&self) -> bool {
        !self.samples.is_empty()
    }

    /// Whether the clock counted instructions.
    pub fn counting(&self) -> bool {
        self.counting
    }

    /// The groups with figures that somebody has, each with them and with those who have any of them.
    pub fn tables(&self) -> Vec<(Group, Vec<&'static Figure>, Vec<&'static str>)> {
        let has = |vmm: &str, group: Group| {
            FIGURES.iter().any(|figure| figure.group == group && self.result(vmm, figure.id).is_some())
        };
        let tables = self.groups.iter().map(|group| {
            let figures = FIGURES.iter().filter(|figure| {
                figure.group == *group && self.results.iter().any(|result| result.figure == figure.id)
            });
            let vmms = vmm::ALL.iter().map(|vmm| vmm.name).filter(|vmm| has(vmm, *group));
            (*group, figures.collect::<Vec<_>>(), vmms.collect::<Vec<_>>())
        });
        tables.filter(|(_, figures, _)| !figures.is_empty()).collect()
    }

    /// A figure of a VMM.
    pub fn result(&self, vmm: &str, figure: FigureId) -> Option<&Result> {
        self.results.iter().find(|result| result.vmm == vmm && result.figure == figure)
    }

    fn calculate(&self) -> Vec<Result> {
        let mut values: BTreeMap<(usize, FigureId), (Vec<f64>, Vec<f64>)> = BTreeMap::new();
        for sample in &self.samples {
            let Some(index) = vmm::ALL.iter().position(|vmm| vmm.name == sample.vmm) else { continue };
            let (of_vmm, idle) = values.entry((index, sample.figure)).or_default();
            of_vmm.push(sample.value);
            idle.extend(sample.idle);
        }
        let results = values.into_iter().filter_map(|((index, figure), (mut values, mut idle))| {
            let median_value = median(&mut values)?;
            let range = values.last()? - values.first()?;
            let spread = if median_value == 0.0 { 0.0 } else { range / median_value };
            let vmm = vmm::ALL.get(index)?.name;
            Some(Result { vmm, figure, median: median_value, spread, idle: median(&mut idle) })
        });
        results.collect()
    }

    /// The best of ours or of the others.
    fn best(&self, figure: &Figure, ours: bool) -> Option<&Result> {
        let theirs = |name: &str| vmm::ALL.iter().any(|vmm| vmm.name == name && vmm.ours() == ours);
        let candidates =
            self.results.iter().filter(|result| result.figure == figure.id && theirs(result.vmm));
        match figure.better {
            Better::Less => candidates.min_by(|a, b| a.median.total_cmp(&b.median)),
            Better::More => candidates.max_by(|a, b| a.median.total_cmp(&b.median)),
        }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        self.render(presets::UTF8_BORDERS_ONLY, |group| format!("{}\n", group.title()))
    }

    /// The same as Markdown.
    pub fn markdown(&self) -> String {
        let heading = |group: Group| {
            let name = serde_json::to_value(group).unwrap_or_default();
            let name = name.as_str().unwrap_or_default();
            format!("## {}\n\n![{}]({name}.svg)\n\n", group.title(), group.title())
        };
        format!("# Speed\n\n{}", self.render(presets::ASCII_MARKDOWN, heading))
    }

    fn render(&self, preset: &str, heading: impl Fn(Group) -> String) -> String {
        let mut text = String::new();
        for (group, figures, vmms) in self.tables() {
            let mut table = Table::new();
            table.load_preset(preset);
            let head = ["figure", "unit"].into_iter().chain(vmms.iter().copied()).chain(["best : best peer"]);
            table.set_header(head);
            for figure in figures {
                let mut row = vec![figure.title.to_owned(), figure.unit.name(self.counting).to_owned()];
                row.extend(vmms.iter().map(|vmm| cell(self.result(vmm, figure.id))));
                row.push(self.ratio(figure));
                table.add_row(row);
            }
            for column in table.column_iter_mut().skip(2) {
                column.set_cell_alignment(CellAlignment::Right);
            }
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{table}\n\n", heading(group));
        }
        text.push_str(&self.placement());
        for line in &self.unavailable {
            let _ = writeln!(text, "Not measured: {line}");
        }
        text.push_str(&self.legend());
        text
    }

    /// How the best of ours stands to the best of the others.
    fn ratio(&self, figure: &Figure) -> String {
        match (self.best(figure, true), self.best(figure, false)) {
            (Some(ours), Some(peer)) if peer.median != 0.0 => {
                format!("{:.2} ({} : {})", ours.median / peer.median, ours.vmm, peer.vmm)
            }
            _ => String::new(),
        }
    }

    /// What the cgroups cost.
    fn placement(&self) -> String {
        let busy = |vmm| self.result(vmm, FigureId::InitBusy).map(|result| result.median);
        match (busy("pinfold"), busy("pinfold-placed")) {
            (Some(without), Some(with)) if without != 0.0 => {
                format!(
                    "Placement in cgroups adds {:+.1} % busy to exec-to-init.\n\n",
                    100.0 * (with / without - 1.0)
                )
            }
            _ => String::new(),
        }
    }

    fn legend(&self) -> String {
        let what = if self.counting {
            "The host's clock counts instructions: of its kernel, the VMM and the guest together, on one CPU. That \
             is the same from run to run, whatever else this machine does. It sees work, and neither cache misses \
             nor the price of a hardware exit, and it cannot show what several CPUs do at the same time. When the \
             host is idle the clock jumps to the next timer, so idle counts are no work; `idle` is their share in \
             the interval, and includes setting up the tool that loads the guest."
        } else {
            "Time was measured: repeat on an idle machine, and compare figures of one run only. `busy` is the CPU \
             time of the whole machine."
        };
        format!(
            "Medians of {} interleaved runs on {}; +- is the largest less the smallest as a part of the median. One \
             vCPU; Debian's cloud kernel 6.1; a disk of 128 MiB on tmpfs; every VMM's own defaults otherwise.\n{what}\n",
            self.runs, self.host
        )
    }
}

fn cell(result: Option<&Result>) -> String {
    let Some(result) = result else { return "-".to_owned() };
    let mut text = format!("{} +-{:.1}%", short(result.median), 100.0 * result.spread);
    if let Some(idle) = result.idle.filter(|idle| *idle >= 0.01) {
        let _ = write!(text, " idle {:.0}%", 100.0 * idle);
    }
    text
}

/// Three or four digits that matter.
pub fn short(value: f64) -> String {
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let options = Options { groups: vec![Group::Net], only: Vec::new(), runs: 3, counting: true };
        let mut report = Report::new(&options, "a host");
        for (vmm, value) in [
            ("pinfold", 4.0),
            ("pinfold", 5.0),
            ("pinfold", 4.4),
            ("pinfold-pci", 6.0),
            ("qemu-q35", 3.0),
            ("qemu-microvm", 2.0),
        ] {
            let idle = (vmm == "qemu-q35").then_some(0.25);
            report.add(Sample { vmm: vmm.to_owned(), figure: FigureId::TcpOut, value, idle });
        }
        report.unavailable("firecracker: none".to_owned());
        report.unavailable("firecracker: none".to_owned());
        report
    }

    #[test]
    fn medians_spreads_and_ratios() {
        let report = report();
        let result = report.result("pinfold", FigureId::TcpOut).unwrap();
        assert!((result.median - 4.4).abs() < 1e-9);
        assert!((result.spread - 1.0 / 4.4).abs() < 1e-9);
        let tables = report.tables();
        let (_, figures, vmms) = &tables[0];
        assert_eq!(vmms, &["pinfold", "pinfold-pci", "qemu-microvm", "qemu-q35"]);
        assert_eq!(figures.len(), 1);
        assert_eq!(report.ratio(figures[0]), "2.00 (pinfold-pci : qemu-q35)");
    }

    #[test]
    fn tables_say_what_is_missing_and_what_is_idle() {
        let text = report().markdown();
        assert_eq!(text.matches("Not measured: firecracker: none").count(), 1);
        assert!(text.contains("| 4.40 +-22.7% |"), "{text}");
        assert!(text.contains("3.00 +-0.0% idle 25%"), "{text}");
        assert!(text.contains("neither cache misses"), "{text}");
    }
}
