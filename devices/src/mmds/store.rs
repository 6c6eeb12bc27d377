//! What the metadata service serves: one JSON document, changed through the API and read by the guest.

use serde_json::{Map, Value};

use super::token::Tokens;

/// Why the document was not changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MmdsError {
    /// It would have become larger than it may be. The API answers with status 413.
    #[error(
        "the MMDS data store would hold {size} bytes of JSON, which is more than its limit of {limit}: store \
         less, or raise the limit with --mmds-size-limit"
    )]
    TooLarge {
        /// Bytes that the document would have as JSON without white space.
        size: usize,
        /// Bytes that it may have.
        limit: usize,
    },
    /// A patch came before there was a document.
    #[error("the MMDS data store is not initialized: PUT /mmds before PATCH /mmds")]
    NotInitialized,
}

/// How the guest may read the document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// With any request. Tokens can be had, and are not looked at.
    #[default]
    V1,
    /// With a token that the guest asked for before.
    V2,
}

/// How a part of the document is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    /// As the instance metadata service of EC2 does: a string is itself, and an object the list of its keys.
    Imds,
}

/// Why a part of the document cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadError {
    NotFound,
    /// Neither a string nor an object, so that it has no form in [`Format::Imds`].
    NotImds,
}

/// The metadata service of a microVM: its document, and who may read it. The API and the network interfaces
/// share one.
pub struct Mmds {
    /// None until the first put.
    document: Option<Value>,
    limit: usize,
    version: Version,
    imds_compat: bool,
    tokens: Tokens,
}

impl Mmds {
    /// A service without a document, whose document may have up to `limit_bytes` as JSON without white space.
    /// It starts as [`Version::V1`] without `imds_compat`.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            document: None,
            limit: limit_bytes,
            version: Version::default(),
            imds_compat: false,
            tokens: Tokens::new(),
        }
    }

    /// Sets how the guest may read the document.
    pub fn set_version(&mut self, version: Version) {
        self.version = version;
    }

    /// Sets whether the guest gets the format of EC2's service whatever its `Accept` header asks for.
    pub fn set_imds_compat(&mut self, imds_compat: bool) {
        self.imds_compat = imds_compat;
    }

    /// Replaces the document.
    ///
    /// # Errors
    /// [`MmdsError::TooLarge`], with the document as it was.
    pub fn put(&mut self, document: Value) -> Result<(), MmdsError> {
        // Display writes JSON without white space.
        let (size, limit) = (document.to_string().len(), self.limit);
        if size > limit {
            return Err(MmdsError::TooLarge { size, limit });
        }
        self.document = Some(document);
        Ok(())
    }

    /// Changes the document by a JSON merge patch (RFC 7396).
    ///
    /// # Errors
    /// [`MmdsError::NotInitialized`] before the first put; [`MmdsError::TooLarge`], with the document as it was.
    pub fn patch(&mut self, patch: Value) -> Result<(), MmdsError> {
        let mut document = self.document.clone().ok_or(MmdsError::NotInitialized)?;
        merge(&mut document, patch);
        self.put(document)
    }

    /// The document, or null before the first put.
    pub fn get(&self) -> Value {
        self.document.clone().unwrap_or_default()
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn imds_compat(&self) -> bool {
        self.imds_compat
    }

    pub(super) fn tokens(&mut self) -> &mut Tokens {
        &mut self.tokens
    }

    /// Writes the part of the document that the JSON pointer `path` (RFC 6901) leads to. Slashes may be
    /// repeated, and one may be at the end.
    pub(super) fn read(&self, path: &str, format: Format) -> Result<String, ReadError> {
        let path = squeeze_slashes(path);
        let pointer = path.strip_suffix('/').unwrap_or(&path);
        let part = self.document.as_ref().and_then(|document| document.pointer(pointer));
        match (part.ok_or(ReadError::NotFound)?, format) {
            (part, Format::Json) => Ok(part.to_string()),
            (Value::String(text), Format::Imds) => Ok(text.clone()),
            (Value::Object(members), Format::Imds) => Ok(list(members)),
            (_, Format::Imds) => Err(ReadError::NotImds),
        }
    }
}

/// The keys, one a line, those of objects with a slash at the end.
fn list(members: &Map<String, Value>) -> String {
    let lines: Vec<String> = members
        .iter()
        .map(|(key, member)| if member.is_object() { format!("{key}/") } else { key.clone() })
        .collect();
    lines.join("\n")
}

/// `path` with one slash where there were several.
pub(super) fn squeeze_slashes(path: &str) -> String {
    let mut squeezed = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !squeezed.ends_with('/') {
            squeezed.push(character);
        }
    }
    squeezed
}

/// RFC 7396, section 2. The depth of a document is bounded by the parser that made it.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else {
        return;
    };
    for (key, change) in patch {
        if change.is_null() {
            members.remove(&key);
        } else {
            merge(members.entry(key).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests;
