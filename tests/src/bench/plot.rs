//! Bars as SVG.

use super::figures::Figure;
use super::report::{Report, Result as Measured, short};
use super::vmm;
use crate::case::Failure;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const WIDTH: u32 = 760;
/// What a chart has beside its bars, and what a bar takes, in pixels.
const FRAME: usize = 80;
const BAR: usize = 22;
const FONT: &str = "sans-serif";
const OURS: RGBColor = RGBColor(0x2a, 0x6f, 0x4e);
const OTHERS: RGBColor = RGBColor(0x9a, 0xa0, 0xa6);

/// A drawing of each group, with the group's name: a chart for each figure, with a bar for each VMM.
pub fn drawings(report: &Report) -> Result<Vec<(String, String)>, Failure> {
    let mut all = Vec::new();
    for (group, figures, vmms) in report.tables() {
        let charts: Vec<(&Figure, Vec<&Measured>)> = figures
            .into_iter()
            .map(|figure| (figure, vmms.iter().filter_map(|vmm| report.result(vmm, figure.id)).collect()))
            .collect();
        let mut svg = String::new();
        draw(&charts, report.counting(), &mut svg)?;
        let name = serde_json::to_value(group)?;
        all.push((name.as_str().unwrap_or_default().to_owned(), svg));
    }
    Ok(all)
}

fn draw(charts: &[(&Figure, Vec<&Measured>)], counting: bool, svg: &mut String) -> Result<(), Failure> {
    let heights = charts.iter().map(|(_, results)| FRAME + BAR * results.len());
    let ends: Vec<i32> = heights
        .scan(0, |end, height| {
            *end += height;
            i32::try_from(*end).ok()
        })
        .collect();
    let height = u32::try_from(ends.last().copied().unwrap_or_default())?;
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for ((figure, results), area) in charts.iter().zip(root.split_by_breakpoints([0; 0], &ends)) {
        let longest = results.iter().map(|result| result.median).fold(f64::MIN_POSITIVE, f64::max);
        let title = format!("{}, {}", figure.title, figure.unit.name(counting));
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 15))
            .margin(8)
            .y_label_area_size(150)
            .x_label_area_size(24)
            .build_cartesian_2d(0.0..longest * 1.15, (0..results.len().saturating_sub(1)).into_segmented())?;
        // The first is on top: values of this axis grow upwards.
        let at = |place: usize| results.len().checked_sub(place + 1).and_then(|index| results.get(index));
        let name = |value: &SegmentValue<usize>| match value {
            SegmentValue::CenterOf(place) => {
                at(*place).map(|result| result.vmm.to_owned()).unwrap_or_default()
            }
            _ => String::new(),
        };
        let beside = TextStyle::from((FONT, 13)).pos(Pos::new(HPos::Left, VPos::Center));
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().light_line_style(TRANSPARENT).label_style((FONT, 13));
        mesh.x_labels(5).y_labels(results.len()).y_label_formatter(&name).draw()?;
        for (place, result) in (0..).map_while(|place| Some((place, at(place)?))) {
            let ours = vmm::ALL.iter().any(|vmm| vmm.name == result.vmm && vmm.ours());
            let colour = if ours { OURS } else { OTHERS };
            let corners =
                [(0.0, SegmentValue::Exact(place)), (result.median, SegmentValue::Exact(place + 1))];
            let mut bar = Rectangle::new(corners, colour.filled());
            bar.set_margin(3, 3, 0, 0);
            let value = Text::new(
                format!(" {}", short(result.median)),
                (result.median, SegmentValue::CenterOf(place)),
                beside.clone(),
            );
            chart.draw_series([bar])?;
            chart.draw_series([value])?;
        }
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::{FigureId, Group};
    use crate::bench::options::{Options, Sample};

    #[test]
    fn a_group_is_drawn_with_all_that_was_measured() {
        let options =
            Options { groups: vec![Group::Boot, Group::Net], only: Vec::new(), runs: 1, counting: true };
        let mut report = Report::new(&options, "a host");
        for (vmm, value) in [("pinfold", 12.5), ("qemu-q35", 140.0)] {
            for figure in [FigureId::FirstInstruction, FigureId::InitBusy] {
                report.add(Sample { vmm: vmm.to_owned(), figure, value, idle: None });
            }
        }
        let drawings = drawings(&report).unwrap();
        let [(group, svg)] = &*drawings else { panic!("{} drawings", drawings.len()) };
        assert_eq!(group, "boot");
        for text in ["exec to init, busy", "pinfold", "qemu-q35", "12.50", "140.0"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
    }
}
