//! Bars as SVG.

use super::report::{Report, short};
use super::vmm;
use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
/// Where bars begin, and how long the longest is.
const LEFT: f64 = 170.0;
const LONGEST: f64 = 440.0;
const LINE: f64 = 20.0;

/// A drawing of each group, with the group's name.
pub fn drawings(report: &Report) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (group, figures, vmms) in report.tables() {
        let mut body = String::new();
        let mut y = LINE;
        for figure in figures {
            let results: Vec<_> = vmms.iter().filter_map(|vmm| report.result(vmm, figure.id)).collect();
            let longest = results.iter().map(|result| result.median).fold(f64::MIN_POSITIVE, f64::max);
            let unit = figure.unit.name(report.counting());
            // Writing to a String cannot fail.
            let _ =
                writeln!(body, r#"<text x="8" y="{y}" font-weight="bold">{} {unit}</text>"#, figure.title);
            y += LINE;
            for result in results {
                let ours = vmm::ALL.iter().any(|vmm| vmm.name == result.vmm && vmm.ours());
                let colour = if ours { "#2a6f4e" } else { "#9aa0a6" };
                let length = LONGEST * result.median / longest;
                let (top, end) = (y - 13.0, LEFT + length + 6.0);
                let _ = writeln!(
                    body,
                    r#"<text x="{}" y="{y}" text-anchor="end">{}</text><rect x="{LEFT}" y="{top}" width="{length:.1}" height="15" fill="{colour}"/><text x="{end:.1}" y="{y}">{}</text>"#,
                    LEFT - 8.0,
                    result.vmm,
                    short(result.median)
                );
                y += LINE;
            }
            y += LINE / 2.0;
        }
        let drawing = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
        );
        let name = serde_json::to_value(group).unwrap_or_default();
        all.push((name.as_str().unwrap_or_default().to_owned(), drawing));
    }
    all
}
