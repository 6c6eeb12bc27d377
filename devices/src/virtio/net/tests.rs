use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::mmds::{Mmds, MmdsPort};
use crate::rate_limiter::{Bucket, LimiterConfig};
use crate::virtio::driver_ring::{DriverRing, Lent};
use crate::virtio::testing::RecordedInterrupt;

fn config() -> NetConfig {
    NetConfig {
        id: "eth0".into(),
        tap: "tap0".into(),
        seen: Seen { mac: None, mtu: None, queues: 1 },
        vhost: VhostMode::Off,
        rx_limiter: LimiterConfig::default(),
        tx_limiter: LimiterConfig::default(),
        mmds: None,
    }
}

/// A device on a file that is no TAP.
fn net(config: NetConfig) -> Net {
    let tap = Tap::from_file(File::open("/dev/null").unwrap());
    let userspace = Userspace::new(config.rx_limiter, config.tx_limiter, None).unwrap();
    Net::with_backend(config, vec![tap], Backend::Userspace(Box::new(userspace)))
}

#[test]
fn features_and_configuration_space() {
    let tap = 1 << 13 | 1 << 12 | 1 << 11 | 1 << 9 | 1 << 8 | 1 << 7 | 1 << 1 | 1;
    let common = 1u64 << 32 | 1 << 29 | 1 << 28 | 1 << 16 | 1 << 15 | tap;
    let plain = net(config());
    assert_eq!(plain.device_type(), 1);
    assert_eq!(plain.queue_max_sizes(), [256, 256]);
    assert_eq!(plain.features(), common);
    assert_eq!(plain.config(), [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(plain.server(), Server::EventLoop);

    let full = net(NetConfig {
        seen: Seen { mac: Some([2, 0, 0, 0, 0, 0x17]), mtu: Some(0x1234), queues: 1 },
        ..config()
    });
    assert_eq!(full.features(), common | 1 << 5 | 1 << 3);
    assert_eq!(full.config(), [2, 0, 0, 0, 0, 0x17, 1, 0, 0, 0, 0x34, 0x12]);
}

#[test]
fn the_tap_is_asked_for_what_the_driver_takes() {
    assert_eq!(offloads(0), 0);
    assert_eq!(offloads(u64::MAX), 1 | 2 | 4 | 8);
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM), 1);
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO6), 1 | 4);
    // Segmentation without checksums is not for the asking.
    assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6), 0);
}

#[test]
fn names_that_no_tap_has_are_refused() {
    for tap in ["", "sixteen-letters-", "a/b", "a b", "a\0b", "a\n"] {
        let error = Net::new(NetConfig { tap: tap.into(), ..config() }).err().unwrap();
        assert!(
            matches!(&error, NetError::Tap { source: TapError::Name(name), .. } if name == tap),
            "{error:?}"
        );
    }
}

#[test]
fn a_tap_that_is_not_there_is_not_created() {
    let error = Net::new(NetConfig { tap: "no-such-tap-%d".into(), ..config() }).err().unwrap();
    let NetError::Tap { id, source } = error else { panic!("{error}") };
    assert_eq!(id, "eth0");
    assert_eq!(
        source.to_string(),
        "TAP no-such-tap-%d does not exist: create it with: ip tuntap add no-such-tap-%d mode tap"
    );
}

#[test]
fn an_mtu_that_the_specification_forbids_is_refused() {
    let error =
        Net::new(NetConfig { seen: Seen { mac: None, mtu: Some(67), queues: 1 }, ..config() }).err().unwrap();
    assert!(matches!(error, NetError::Mtu { mtu: 67, .. }));
}

fn limited() -> LimiterConfig {
    LimiterConfig { bandwidth: None, ops: Some(Bucket { size: 1, refill_time_ms: 1, one_time_burst: 0 }) }
}

#[test]
fn what_needs_to_see_packets_keeps_vhost_away() {
    let port =
        || Some(MmdsPort::new(Arc::new(Mutex::new(Mmds::new(1000))), Ipv4Addr::new(169, 254, 169, 254)));
    for (field, mut config) in [
        ("rx_rate_limiter", NetConfig { rx_limiter: limited(), ..config() }),
        ("tx_rate_limiter", NetConfig { tx_limiter: limited(), ..config() }),
        ("mmds-config", NetConfig { mmds: port(), ..config() }),
    ] {
        config.vhost = VhostMode::Off;
        assert!(choose_vhost(&config).unwrap().is_none());
        config.vhost = VhostMode::Auto;
        assert!(choose_vhost(&config).unwrap().is_none());
        config.vhost = VhostMode::On;
        let text = choose_vhost(&config).err().unwrap().to_string();
        assert!(text.contains("vhost \"on\"") && text.contains(&format!("leave out {field}")), "{text}");
    }
}

#[test]
fn limits_change_where_we_see_the_packets() {
    let sets = LimiterUpdate { bandwidth: None, ops: limited().ops };
    let removes = LimiterUpdate { bandwidth: Some(Bucket::default()), ops: Some(Bucket::default()) };
    let mut userspace = net(config());
    userspace.set_limiters(sets, removes).unwrap();
    // The TAP, two timers, and changes of the host's interfaces.
    assert_eq!(userspace.event_sources().len(), 4);

    // Where there is no vhost-net, there is nothing to refuse.
    let Ok(vhost) = Vhost::new(1) else { return };
    let tap = Tap::from_file(File::open("/dev/null").unwrap());
    let mut vhost = Net::with_backend(config(), vec![tap], Backend::Vhost(vhost));
    vhost.set_limiters(LimiterUpdate::default(), removes).unwrap();
    for (rx, tx) in [(sets, removes), (removes, sets)] {
        let text = vhost.set_limiters(rx, tx).unwrap_err().to_string();
        assert!(text.contains("vhost-net moves the packets inside the kernel"), "{text}");
    }
}

/// A device with so many pairs, on sockets, and the host's ends of these.
fn several(queues: u8) -> (Net, Vec<File>) {
    let (mut taps, mut hosts) = (Vec::new(), Vec::new());
    for _ in 0..queues {
        let (tap, host) = UnixDatagram::pair().unwrap();
        taps.push(Tap::from_file(File::from(OwnedFd::from(tap))));
        hosts.push(File::from(OwnedFd::from(host)));
    }
    let userspace = Userspace::new(LimiterConfig::default(), LimiterConfig::default(), None).unwrap();
    let config = NetConfig { seen: Seen { mac: None, mtu: None, queues }, ..config() };
    (Net::with_backend(config, taps, Backend::Userspace(Box::new(userspace))), hosts)
}

#[test]
fn pairs_of_queues_are_offered_with_a_control_queue() {
    let (net, _) = several(3);
    assert_eq!(net.features() & (1 << 22 | 1 << 17), 1 << 22 | 1 << 17);
    assert_eq!(net.queue_max_sizes(), [256; 7]);
    assert_eq!(net.config(), [0, 0, 0, 0, 0, 0, 1, 0, 3, 0, 0, 0]);
    for queues in [0, 17] {
        let error =
            Net::new(NetConfig { seen: Seen { mac: None, mtu: None, queues }, ..config() }).err().unwrap();
        assert!(matches!(error, NetError::Queues { .. }), "{error}");
    }
}

/// A driver with rings for so many queues, which accepted `features`; without the queues in `absent`.
fn activation(
    memory: &GuestMemoryMmap,
    count: u16,
    features: u64,
    absent: &[u16],
) -> (Activation, Vec<DriverRing>) {
    let interrupt = Arc::new(RecordedInterrupt::default());
    let rings: Vec<_> =
        (0..count).map(|index| DriverRing::new(memory, 0x1000 * u64::from(index + 1))).collect();
    let queues = (0..count)
        .zip(&rings)
        .map(|(index, ring)| (!absent.contains(&index)).then(|| ring.virtqueue(index, interrupt.clone()).0))
        .collect();
    let memory = GuestMemoryAtomic::new(memory.clone());
    (Activation { memory, queues, features, interrupt }, rings)
}

/// The answer to a command for so many pairs, on `ring`, which is the queue `index`.
fn set_pairs(net: &mut Net, memory: &GuestMemoryMmap, ring: &mut DriverRing, index: usize, pairs: u8) -> u8 {
    memory.write_slice(&[4, 0, pairs, 0, 0xff], GuestAddress(0xf000)).unwrap();
    ring.lend(&[Lent::Read(0xf000, 4), Lent::Write(0xf004, 1)]);
    net.queue_event(index).unwrap();
    assert!(ring.used().is_some());
    memory.read_obj(GuestAddress(0xf004)).unwrap()
}

#[test]
fn the_control_queue_is_behind_the_pairs_that_the_driver_knows() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let (mut net, _hosts) = several(2);
    // A socket has no offloads to set; without a link nobody asks it.
    net.config[STATUS_AT..8].copy_from_slice(&status(false));
    let (with_pairs, mut rings) = activation(&memory, 5, 1 << 17 | 1 << 22, &[]);
    net.start(with_pairs).unwrap();
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[4], 4, 1), 0);
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[4], 4, 0), 1);
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[4], 4, 3), 1);
    // What stands in for a TAP here has no second queue: that is refused, and the first goes on.
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[4], 4, 2), 1);
    assert_eq!(net.running.as_ref().unwrap().active(), 1);
    net.reset();

    let (alone, mut rings) = activation(&memory, 5, 1 << 17, &[3, 4]);
    net.start(alone).unwrap();
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[2], 2, 1), 0);
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[2], 2, 2), 1);
    net.reset();

    // Without the second pair's own.
    let (gap, mut rings) = activation(&memory, 5, 1 << 17 | 1 << 22, &[3]);
    net.start(gap).unwrap();
    assert_eq!(set_pairs(&mut net, &memory, &mut rings[4], 4, 2), 1);
    for index in 0..6 {
        net.queue_event(index).unwrap();
    }
    net.reset();

    let (nothing, _) = activation(&memory, 5, 1 << 17 | 1 << 22, &[1]);
    assert!(matches!(net.start(nothing), Err(DeviceError::Driver(_))));
}

#[test]
fn a_driver_that_left_the_control_queue_out_uses_one_pair() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let (mut net, _hosts) = several(2);
    // A socket has no offloads to set; without a link nobody asks it.
    net.config[STATUS_AT..8].copy_from_slice(&status(false));
    let (plain, mut rings) = activation(&memory, 5, 1 << 22, &[4]);
    net.start(plain).unwrap();
    memory.write_slice(&[4, 0, 1, 0, 0xff], GuestAddress(0xf000)).unwrap();
    rings[2].lend(&[Lent::Write(0xf000, 100)]);
    net.queue_event(2).unwrap();
    net.queue_event(4).unwrap();
    assert_eq!(rings[2].used(), None);
}

#[test]
fn without_its_tap_the_link_is_down() {
    // A file that is attached to no TAP, as one whose TAP was deleted.
    let Ok(file) = File::open("/dev/net/tun") else { return };
    let mut net = net(config());
    net.check_link();
    assert!(!net.config_changed());
    net.taps = vec![Tap::from_file(file)];
    let link = net.link.as_ref().unwrap().as_raw_fd();
    net.source_event(link).unwrap();
    assert_eq!(net.config()[6..8], [0, 0]);
    assert!(net.config_changed());
    net.check_link();
    assert!(!net.config_changed(), "told already");
    // A driver that starts now finds no packets, and no fault.
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    net.start(activation(&memory, 2, 0, &[]).0).unwrap();
    net.queue_event(0).unwrap();
    net.queue_event(1).unwrap();
}
