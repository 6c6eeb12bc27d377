//! Names that users give to microVMs and devices.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Declares a newtype over a string that holds only names which pass `$check`.
macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:expr, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                let check: fn(&str) -> bool = $check;
                if check(&text) { Ok(Self(text)) } else { Err(format!("{text:?} is not {}", $rule)) }
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The id of a device: what the API's paths name it by.
    ResourceId,
    |text| !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
    "an id: 1 to 64 letters, digits and underscores"
);

name_type!(
    /// The id of a microVM.
    InstanceId,
    |text| !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
    "an instance id: 1 to 64 letters, digits and hyphens"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_hold_to_their_alphabet() {
        assert!("drive_0".parse::<ResourceId>().is_ok());
        for bad in ["", "a-b", "a/b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ResourceId>().is_err(), "{bad}");
        }
        assert!("anonymous-instance".parse::<InstanceId>().is_ok());
        assert!("a_b".parse::<InstanceId>().is_err());
    }
}
