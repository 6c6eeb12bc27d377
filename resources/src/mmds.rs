//! `mmds-config`: the metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ResourceId;

/// How the guest asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// By a plain GET.
    #[default]
    V1,
    /// With a token of a session.
    V2,
}

/// Who can reach the metadata service, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// The network interfaces through which the guest reaches it.
    pub network_interfaces: Vec<ResourceId>,
    /// How the guest asks.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The address at which the guest asks: 169.254.169.254 when absent or null.
    #[serde(default = "default_address", deserialize_with = "address")]
    pub ipv4_address: Ipv4Addr,
    /// Whether answers are in the format of EC2's service whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

fn default_address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

/// Clients that have no opinion say null.
fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(default_address))
}

impl MmdsConfig {
    /// What is wrong with the values, as the field and why. `known` says which interfaces there are.
    pub(crate) fn check(&self, known: impl Fn(&ResourceId) -> bool) -> Result<(), (&'static str, String)> {
        if self.network_interfaces.is_empty() {
            return Err(("network_interfaces", "is empty: name at least one interface".to_owned()));
        }
        if let Some(id) = self.network_interfaces.iter().find(|id| !known(id)) {
            return Err(("network_interfaces", format!("there is no network interface \"{id}\"")));
        }
        // Others would be sent to the gateway, or are groups (RFC 3927: .0.x and .255.x are reserved).
        let [a, b, c, _] = self.ipv4_address.octets();
        if (a, b) != (169, 254) || c == 0 || c == 255 {
            return Err((
                "ipv4_address",
                format!("{} is not a link-local address (169.254.1.0 to 169.254.254.255)", self.ipv4_address),
            ));
        }
        Ok(())
    }
}
