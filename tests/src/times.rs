//! Where the time of a run went, for people.

use crate::route::Kind;
use std::collections::BTreeMap;
use std::time::Duration;

/// How many of the slowest cases are shown.
const SLOWEST: usize = 15;

/// How long a case took.
#[derive(Debug, Clone)]
pub struct Took {
    /// Its name.
    pub case: &'static str,
    /// The kind of host that it ran in; none is this machine.
    pub spot: Option<Kind>,
    /// The time of the case itself.
    pub took: Duration,
    /// What was spent before it on building and booting its host.
    pub prepared: Duration,
}

/// The sums of each kind of host, and the slowest cases.
pub fn report(all: &[Took]) -> String {
    let mut sums = BTreeMap::<Option<Kind>, (usize, Duration, Duration)>::new();
    for one in all {
        let (count, took, prepared) = sums.entry(one.spot).or_default();
        *count += 1;
        *took += one.took;
        *prepared += one.prepared;
    }
    let mut text = String::new();
    for (spot, (count, took, prepared)) in sums {
        let cases = if count == 1 { "case" } else { "cases" };
        let (took, prepared) = (took.as_secs_f32(), prepared.as_secs_f32());
        text += &format!(
            "{took:7.1} s  {count} {cases}, {}; before, {prepared:.1} s to build and boot\n",
            name(spot)
        );
    }
    let mut slowest: Vec<_> = all.iter().collect();
    slowest.sort_by_key(|one| std::cmp::Reverse(one.took));
    if slowest.len() > SLOWEST {
        text += "the slowest:\n";
    }
    for one in slowest.iter().take(SLOWEST) {
        text += &format!("{:7.1} s  {} ({})\n", one.took.as_secs_f32(), one.case, name(one.spot));
    }
    text
}

fn name(spot: Option<Kind>) -> String {
    spot.map_or_else(|| "this machine".to_owned(), |kind| kind.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{CgroupVersion, Kernel};

    #[test]
    fn sums_and_the_slowest_are_told() {
        let spot = Some(Kind { kernel: Kernel::V6_1, cgroup: CgroupVersion::V2 });
        let one = |case, took, prepared| {
            let [took, prepared] = [took, prepared].map(Duration::from_millis);
            Took { case, spot, took, prepared }
        };
        let here = Took { spot: None, ..one("here", 100, 0) };
        let text = report(&[here, one("short", 1_500, 12_000), one("long", 61_250, 0)]);
        let wanted = "    0.1 s  1 case, this machine; before, 0.0 s to build and boot\n   \
                      62.8 s  2 cases, cgroup v2, kernel 6.1; before, 12.0 s to build and boot\n   \
                      61.2 s  long (cgroup v2, kernel 6.1)\n    \
                      1.5 s  short (cgroup v2, kernel 6.1)\n    \
                      0.1 s  here (this machine)\n";
        assert_eq!(text, wanted);
        let many = vec![one("many", 1, 0); SLOWEST + 1];
        assert_eq!(report(&many).lines().count(), 2 + SLOWEST);
    }
}
