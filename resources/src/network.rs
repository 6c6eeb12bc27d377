//! `network-interfaces`.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{RateLimiter, ResourceId};

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl TryFrom<String> for MacAddr {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a MAC address such as 06:00:ac:10:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        // A device's own address names one station (IEEE 802: the group bit is clear).
        if parts.next().is_some() || bytes[0] & 1 == 1 { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Whether the kernel's vhost-net moves the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostMode {
    /// Where /dev/vhost-net can be opened.
    #[default]
    Auto,
    /// Always; refuse to start without it.
    On,
    /// Never.
    Off,
}

/// Who moves the packets of a running interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// The kernel.
    VhostNet,
    /// We do.
    Pinfold,
    /// The server behind the interface's socket.
    VhostUser,
}

/// A network interface: on a TAP, or served by another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name in the API.
    pub iface_id: ResourceId,
    /// The TAP on the host. It must exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Socket of a vhost-user-net server, instead of a TAP: passt, or a switch in user space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The address that the guest sees; the guest chooses one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddr>,
    /// The MTU that the guest is told, 68 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Whether the kernel moves the packets.
    #[serde(default)]
    pub vhost: VhostMode,
    /// Pairs of queues, 1 to [`NetworkInterface::QUEUES_MAX`]. The TAP must have been made for several if they are, or
    /// the server must have as many.
    #[serde(default = "one")]
    pub queues: u8,
    /// What came of `vhost`, once the microVM runs. It may stand in a declaration, so that what is shown can be declared
    /// again, and says nothing there.
    #[serde(default, deserialize_with = "unheeded", skip_serializing_if = "Option::is_none")]
    pub backend: Option<NetBackend>,
}

fn one() -> u8 {
    1
}

fn unheeded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NetBackend>, D::Error> {
    NetBackend::deserialize(deserializer).map(|_| None)
}

impl NetworkInterface {
    /// The most pairs of queues.
    pub const QUEUES_MAX: u8 = 16;

    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        match (&self.host_dev_name, &self.socket) {
            (Some(tap), None) => check_tap(tap)?,
            (None, Some(_)) => self.check_served()?,
            (Some(_), Some(_)) => {
                return Err(("host_dev_name", "excludes socket: leave out one of them".to_owned()));
            }
            (None, None) => {
                let problem = "missing: name the TAP behind the interface, or a server's socket";
                return Err(("host_dev_name", problem.to_owned()));
            }
        }
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(("mtu", "must be at least 68".to_owned()));
        }
        if !(1..=Self::QUEUES_MAX).contains(&self.queues) {
            return Err(("queues", format!("must be 1 to {}", Self::QUEUES_MAX)));
        }
        match (self.vhost, self.limited()) {
            (VhostMode::On, Some(field)) => {
                let problem = "the kernel's vhost-net limits nothing; set vhost to \"auto\" or \"off\"";
                Err((field, problem.to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// A server moves packets by its own lights.
    fn check_served(&self) -> Result<(), (&'static str, String)> {
        let field = if self.vhost == VhostMode::Auto { self.limited() } else { Some("vhost") };
        match field {
            Some(field) => {
                Err((field, "is not to be had on an interface with a socket; leave it out".to_owned()))
            }
            None => Ok(()),
        }
    }

    /// The field with a limit, if there is one.
    fn limited(&self) -> Option<&'static str> {
        [("rx_rate_limiter", self.rx_rate_limiter), ("tx_rate_limiter", self.tx_rate_limiter)]
            .into_iter()
            .find(|(_, limiter)| limiter.is_some_and(|limiter| !limiter.is_unlimited()))
            .map(|(field, _)| field)
    }
}

fn check_tap(name: &str) -> Result<(), (&'static str, String)> {
    // IFNAMSIZ is 16 with the closing NUL.
    if (1..=15).contains(&name.len()) && !name.contains(['/', '\0', ' ']) {
        return Ok(());
    }
    Err(("host_dev_name", format!("{name:?} is not an interface's name of 1 to 15 bytes")))
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Which interface.
    pub iface_id: ResourceId,
    /// Other limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits on what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_of_it_is_shown_and_not_declared() {
        let declared = r#"{"iface_id":"eth0","host_dev_name":"tap0","vhost":"auto","queues":2}"#;
        let mut interface: NetworkInterface = serde_json::from_str(declared).unwrap();
        assert_eq!(serde_json::to_string(&interface).unwrap(), declared);
        let plain = interface.clone();
        interface.backend = Some(NetBackend::VhostNet);
        let shown = serde_json::to_string(&interface).unwrap();
        assert!(shown.ends_with(r#","backend":"vhost-net"}"#), "{shown}");
        assert_eq!(serde_json::from_str::<NetworkInterface>(&shown).unwrap(), plain);
    }

    #[test]
    fn an_interface_is_on_a_tap_or_on_a_socket() {
        for (fields, wrong) in [
            (r#""host_dev_name":"tap0""#, None),
            (r#""socket":"/run/net""#, None),
            (r#""socket":"/run/net","rx_rate_limiter":{},"queues":2,"mtu":1400"#, None),
            (r#""queues":1"#, Some("host_dev_name")),
            (r#""host_dev_name":"tap0","socket":"/run/net""#, Some("host_dev_name")),
            (r#""socket":"/run/net","vhost":"off""#, Some("vhost")),
            (
                r#""socket":"/run/net","tx_rate_limiter":{"ops":{"size":1,"refill_time":1}}"#,
                Some("tx_rate_limiter"),
            ),
        ] {
            let interface: NetworkInterface =
                serde_json::from_str(&format!(r#"{{"iface_id":"eth0",{fields}}}"#)).unwrap();
            assert_eq!(interface.check().err().map(|(field, _)| field), wrong, "{fields}");
        }
    }

    #[test]
    fn the_number_of_queues_is_bounded() {
        for (queues, good) in [(0, false), (1, true), (16, true), (17, false)] {
            let text = format!(r#"{{"iface_id":"eth0","host_dev_name":"tap0","queues":{queues}}}"#);
            let checked = serde_json::from_str::<NetworkInterface>(&text).unwrap().check();
            assert_eq!(checked.err().map(|(field, _)| field), (!good).then_some("queues"));
        }
    }

    #[test]
    fn mac_addresses_are_read_and_shown() {
        let mac = MacAddr::try_from("06:00:AC:10:00:02".to_owned()).unwrap();
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        for bad in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:0:ac:10:0:2",
            "gg:00:ac:10:00:02",
            "01:00:ac:10:00:02",
        ] {
            assert!(MacAddr::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
