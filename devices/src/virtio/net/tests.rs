use std::fs::File;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use super::*;
use crate::mmds::Mmds;
use crate::rate_limiter::Bucket;

fn config() -> NetConfig {
    NetConfig {
        id: "eth0".into(),
        tap: "tap0".into(),
        mac: None,
        vhost: VhostMode::Off,
        mtu: None,
        rx_limiter: LimiterConfig::default(),
        tx_limiter: LimiterConfig::default(),
        mmds: None,
    }
}

/// A device on a file that is no TAP.
fn net(config: NetConfig) -> Net {
    let tap = Tap::from_file(File::open("/dev/null").unwrap());
    let userspace = Userspace::new(config.rx_limiter, config.tx_limiter, None).unwrap();
    Net::with_backend(config, tap, Backend::Userspace(Box::new(userspace)))
}

#[test]
fn features_and_configuration_space() {
    let common = 1u64 << 32 | 1 << 29 | 1 << 28 | 1 << 12 | 1 << 11 | 1 << 8 | 1 << 7 | 1 << 1 | 1;
    let plain = net(config());
    assert_eq!(plain.device_type(), 1);
    assert_eq!(plain.queue_max_sizes(), [256, 256]);
    assert_eq!(plain.features(), common);
    assert_eq!(plain.config(), [0; 12]);
    assert_eq!(plain.server(), Server::EventLoop);

    let full = net(NetConfig { mac: Some([2, 0, 0, 0, 0, 0x17]), mtu: Some(0x1234), ..config() });
    assert_eq!(full.features(), common | 1 << 5 | 1 << 3);
    assert_eq!(full.config(), [2, 0, 0, 0, 0, 0x17, 0, 0, 0, 0, 0x34, 0x12]);
}

#[test]
fn the_tap_is_asked_for_what_the_driver_takes() {
    assert_eq!(offloads(0), 0);
    assert_eq!(offloads(u64::MAX), 1 | 2 | 4);
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
    let error = Net::new(NetConfig { mtu: Some(67), ..config() }).err().unwrap();
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
    assert_eq!(userspace.event_sources().len(), 3);

    // Where there is no vhost-net, there is nothing to refuse.
    let Ok(vhost) = Vhost::new() else { return };
    let tap = Tap::from_file(File::open("/dev/null").unwrap());
    let mut vhost = Net::with_backend(config(), tap, Backend::Vhost(vhost));
    vhost.set_limiters(LimiterUpdate::default(), removes).unwrap();
    for (rx, tx) in [(sets, removes), (removes, sets)] {
        let text = vhost.set_limiters(rx, tx).unwrap_err().to_string();
        assert!(text.contains("vhost-net moves the packets inside the kernel"), "{text}");
    }
}
