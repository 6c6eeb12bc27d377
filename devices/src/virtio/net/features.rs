//! What is offered to the driver, and what its choice means for the host.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::Seen;

/// What vhost-net may lack: VERSION_1, what rings need, and packets over several buffers.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What every TAP does: unfinished checksums and segmentation of TCP in both directions. (Linux has had no fragmentation
/// of UDP to offer since 4.14.)
const TAP_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// What a server by vhost-user is asked for: who moves the packets has these to offer, or not.
pub(super) const OF_SERVERS: u64 = TAP_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The features of an interface on a TAP. `vhost` are those that the kernel's vhost-net has, if that moves the packets.
pub(super) fn offered(seen: &Seen, vhost: Option<u64>) -> u64 {
    own(seen) | TAP_FEATURES | RING_FEATURES & vhost.unwrap_or(u64::MAX)
}

/// Those that are ours, whoever moves the packets.
pub(super) fn own(seen: &Seen) -> u64 {
    [
        (true, 1 << VIRTIO_NET_F_STATUS),
        (seen.mac.is_some(), 1 << VIRTIO_NET_F_MAC),
        (seen.mtu.is_some(), 1 << VIRTIO_NET_F_MTU),
        (seen.queues > 1, 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ),
    ]
    .into_iter()
    .filter(|(wanted, _)| *wanted)
    .fold(0, |all, (_, bits)| all | bits)
}

/// Whether the driver that accepted `features` takes a packet in several buffers.
pub(super) fn has_merged_buffers(features: u64) -> bool {
    has(features, VIRTIO_NET_F_MRG_RXBUF)
}

/// Whether it knows of all pairs of queues, and not only of the first.
pub(super) fn has_pairs(features: u64) -> bool {
    has(features, VIRTIO_NET_F_MQ)
}

/// Whether it has a control queue behind the pairs that it knows of.
pub(super) fn has_control(features: u64) -> bool {
    has(features, VIRTIO_NET_F_CTRL_VQ)
}

/// What it takes from the TAP, as TUN_F_* bits.
pub(super) fn offloads(features: u64) -> libc::c_uint {
    // Segmentation needs checksums, and ECN segmentation (virtio 1.2, section 5.1.3.1). The TAP refuses what does not.
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let segmentation =
        [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
            .into_iter()
            .filter(|(feature, _)| has(features, *feature))
            .fold(0, |bits, (_, bit)| bits | bit);
    let ecn = segmentation != 0 && has(features, VIRTIO_NET_F_GUEST_ECN);
    libc::TUN_F_CSUM | segmentation | if ecn { libc::TUN_F_TSO_ECN } else { 0 }
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}
