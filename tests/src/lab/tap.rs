//! TAP devices on the host's side of a guest's network.

use crate::case::Failure;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

/// A persistent TAP with an address, deleted on drop.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes the TAP `name` (15 bytes at most) with `address` (`10.0.0.1/24`) and brings it up.
    pub fn create(name: &str, address: &str) -> Result<Self, Failure> {
        Self::make(name, address, &[])
    }

    /// The same for several queues.
    pub fn create_multi_queue(name: &str, address: &str) -> Result<Self, Failure> {
        Self::make(name, address, &["multi_queue"])
    }

    fn make(name: &str, address: &str, options: &[&str]) -> Result<Self, Failure> {
        ip(&[&["tuntap", "add", "dev", name, "mode", "tap"], options].concat())?;
        let tap = Self { name: name.to_owned() };
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Attaches to the TAP, which is busy for everybody else until the file is closed.
    pub fn hold(&self) -> Result<File, Failure> {
        // `_IOW('T', 202, int)`, and the flags for whole Ethernet frames (include/uapi/linux/if_tun.h).
        const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
        const IFF_TAP_NO_PI: u16 = 0x0002 | 0x1000;
        // A struct ifreq: 16 bytes of name, then a union that starts with the flags.
        let mut request = [0_u8; 40];
        request[..self.name.len()].copy_from_slice(self.name.as_bytes());
        request[16..18].copy_from_slice(&IFF_TAP_NO_PI.to_ne_bytes());
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: the ioctl reads and writes a struct ifreq, which is 40 bytes here.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } == 0 {
            return Ok(file);
        }
        Err(Failure(format!("cannot attach to {}: {}", self.name, std::io::Error::last_os_error())))
    }

    /// Packets received from the guest.
    pub fn packets(&self) -> Result<u64, Failure> {
        self.count("rx_packets")
    }

    /// A counter of the interface, as seen by the host: `rx_bytes` came from the guest.
    pub fn count(&self, name: &str) -> Result<u64, Failure> {
        let file = format!("/sys/class/net/{}/statistics/{name}", self.name);
        Ok(super::read(file.as_ref())?.trim().parse()?)
    }

    /// Deletes it, whoever uses it.
    pub fn delete(self) -> Result<(), Failure> {
        ip(&["link", "delete", &self.name])?;
        std::mem::forget(self);
        Ok(())
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
