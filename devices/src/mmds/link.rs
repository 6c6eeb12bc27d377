//! The cable between the guest and the TCP/IP stack: Ethernet frames on the guest's side, IPv4 packets on the
//! stack's.
//!
//! The stack knows nothing of Ethernet, since there is nothing to resolve: whoever sent the last frame is who the
//! next one goes to, as in Firecracker. So the stack asks the guest for no address, and the guest may use any.

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
};

/// The service's own address, which is Firecracker's.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);

/// Bytes of the Ethernet header.
const HEADER_LEN: usize = EthernetFrame::<&[u8]>::header_len();

/// Bytes of the longest IPv4 packet to the guest.
const MTU: usize = 1500;

/// Frames that may wait for the guest. What is more is lost, and TCP sends it again.
const MAX_WAITING: usize = 64;

pub(super) struct Link {
    guest: EthernetAddress,
    from_guest: Option<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
    refused: bool,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            guest: EthernetAddress::BROADCAST,
            from_guest: None,
            to_guest: VecDeque::new(),
            refused: false,
        }
    }

    /// Lends the stack the packet in a frame of the guest.
    pub(super) fn put_packet(&mut self, frame: &EthernetFrame<&[u8]>) {
        self.guest = frame.src_addr();
        self.from_guest = Some(frame.payload().to_vec());
    }

    /// Answers the ARP request in a frame of the guest.
    pub(super) fn answer_arp(&mut self, frame: &EthernetFrame<&[u8]>) {
        let Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpPacket::new_checked(frame.payload()).and_then(|packet| ArpRepr::parse(&packet))
        else {
            return;
        };
        self.guest = source_hardware_addr;
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: MAC,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        self.send(EthernetProtocol::Arp, reply.buffer_len(), |payload| {
            reply.emit(&mut ArpPacket::new_unchecked(payload));
        });
    }

    /// Takes the next frame for the guest.
    pub(super) fn take_frame(&mut self) -> Option<Vec<u8>> {
        self.to_guest.pop_front()
    }

    /// Whether a frame waits for the guest.
    pub(super) fn has_frame(&self) -> bool {
        !self.to_guest.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.to_guest.len() >= MAX_WAITING
    }

    /// Whether there was no room for a frame since this was last called.
    pub(super) fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn send<R>(&mut self, ethertype: EthernetProtocol, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = vec![0; HEADER_LEN + len];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        EthernetRepr { src_addr: MAC, dst_addr: self.guest, ethertype }.emit(&mut frame);
        let result = fill(frame.payload_mut());
        if self.is_full() {
            self.refused = true;
        } else {
            self.to_guest.push_back(bytes);
        }
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Packet, Sender<'_>)> {
        let packet = self.from_guest.take()?;
        Some((Packet(packet), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        if self.is_full() {
            self.refused = true;
            return None;
        }
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The guest leaves its checksums to the device.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A packet from the guest.
pub(super) struct Packet(Vec<u8>);

impl RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

/// The permission to send the guest a packet.
pub(super) struct Sender<'a>(&'a mut Link);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.0.send(EthernetProtocol::Ipv4, len, fill)
    }
}
