//! Where the groups are in each hierarchy, for whoever reads or writes their files.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::{FileError, Files};
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

/// Files of groups, of which errors say where they were looked up.
pub(crate) struct Located<'a> {
    pub(crate) files: &'a dyn Files,
    pub(crate) layout: &'a Layout,
}

impl Located<'_> {
    fn locate(&self, error: FileError) -> FileError {
        match self.layout.sites.iter().find(|site| site.hierarchy.holds(error.path())) {
            Some(site) => error.in_sight_of(&site.hierarchy),
            None => error,
        }
    }
}

impl Files for Located<'_> {
    fn exists(&self, path: &Path) -> bool {
        self.files.exists(path)
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        self.files.read(path).map_err(|error| self.locate(error))
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        self.files.write(path, value).map_err(|error| self.locate(error))
    }
}
