//! Where the groups are in each hierarchy, for whoever reads or writes their files.

use serde::{Deserialize, Serialize};

use crate::plan::Site;
use crate::reach::Reach;

/// The groups of all hierarchies as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub(crate) v2: bool,
    pub(crate) sites: Vec<Site>,
    #[serde(skip)]
    pub(crate) reach: Reach,
}

impl Layout {
    /// The same groups, whose files are reached another way.
    pub(crate) fn reached_by(&self, reach: Reach) -> Self {
        Self { reach, ..self.clone() }
    }

    /// The groups by whose files a controller is asked.
    pub(crate) fn site(&self, controller: &str) -> Option<&Site> {
        self.sites.iter().find(|site| self.v2 || site.hierarchy.has(controller))
    }
}
