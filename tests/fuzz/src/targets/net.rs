//! A network interface without vhost-net, between its driver and a host that sends packets.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use devices::mmds::{Mmds, MmdsPort};
use devices::rate_limiter::LimiterUpdate;
use devices::virtio::net::{Net, NetConfig, Seen, VhostMode};

use crate::guest::Guest;
use crate::host::packet_pair;
use crate::input::Input;
use crate::targets::limiter;

/// An interface and its driver; the host sends, receives, and changes the limits.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    let queues = if choice & 1 == 0 { 1 } else { 2 };
    let mmds = (choice & 2 != 0).then(|| {
        let mmds = Arc::new(Mutex::new(Mmds::new(51200)));
        MmdsPort::new(mmds, Ipv4Addr::new(169, 254, 169, 254))
    });
    let config = NetConfig {
        id: "eth0".to_owned(),
        tap: "tap0".to_owned(),
        seen: Seen { mac: Some([2, 0, 0, 0, 0, 1]), queues, mtu: (choice & 4 != 0).then_some(1500) },
        vhost: VhostMode::Off,
        rx_limiter: limiter(choice & 8 != 0, &mut input),
        tx_limiter: limiter(choice & 16 != 0, &mut input),
        mmds,
    };
    let pairs = (0..queues).map(|_| packet_pair());
    let pairs = pairs.collect::<Result<Vec<_>, _>>().expect("the host has descriptors");
    let (taps, mut ends): (Vec<_>, Vec<_>) = pairs.into_iter().map(|[tap, end]| (tap, end)).unzip();
    let net = Net::on_sockets(config, taps).expect("the configuration is right");
    let mut guest = Guest::new(Box::new(net), false, &mut input).expect("the host has memory");
    guest.live(&mut input, |guest, input| {
        let choice = input.u8();
        let end = &mut ends[usize::from(choice >> 7) % usize::from(queues)];
        match choice & 3 {
            0 => {
                guest.slot().update(|net: &mut Net| {
                    let limits = limiter(input.flag(), input);
                    let update = LimiterUpdate { bandwidth: limits.bandwidth, ops: limits.ops };
                    net.set_limiters(update, update).expect("it is not on vhost-net");
                });
            }
            1 => {
                let mut packet = [0; 4096];
                while end.read(&mut packet).is_ok_and(|len| len > 0) {}
            }
            _ => {
                let mut packet = input.short_bytes().to_vec();
                if choice & 4 != 0 {
                    packet.resize(usize::from(input.u16()), 7);
                }
                // A socket that is full loses it, like a cable. Nothing at all would be its end.
                if !packet.is_empty() {
                    let _ = end.write(&packet);
                }
            }
        }
    });
}
