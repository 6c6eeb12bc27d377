//! TAP devices on the host's side of a guest's network.

use crate::case::Failure;
use std::process::Command;

/// A persistent TAP with an address, deleted on drop.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes the TAP `name` (15 bytes at most) with `address` (`10.0.0.1/24`) and brings it up.
    pub fn create(name: &str, address: &str) -> Result<Self, Failure> {
        ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        let tap = Self { name: name.to_owned() };
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Packets received from the guest.
    pub fn packets(&self) -> Result<u64, Failure> {
        let file = format!("/sys/class/net/{}/statistics/rx_packets", self.name);
        Ok(super::read(file.as_ref())?.trim().parse()?)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(failure) = ip(&["link", "delete", &self.name]) {
            eprintln!("lab: {failure}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Failure(format!("ip {}: {}", arguments.join(" "), text.trim())))
}
