//! Where the groups are in each hierarchy, for whoever reads or writes their files.

use serde::{Deserialize, Serialize};

use crate::plan::Site;

/// The groups of all hierarchies as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub(crate) v2: bool,
    pub(crate) sites: Vec<Site>,
}

impl Layout {
    /// The groups by whose files a controller is asked.
    pub(crate) fn site(&self, controller: &str) -> Option<&Site> {
        self.sites.iter().find(|site| self.v2 || site.hierarchy.has(controller))
    }
}
