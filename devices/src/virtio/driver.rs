//! What the driver has told a device so far, whatever the transport: the status, the features, the queues
//! (virtio 1.2, sections 2.1, 2.2 and 3.1). Nothing here touches guest memory or the device.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Bits of the device status that the driver sets, in the order in which it must: each needs those before it.
const STEPS: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// What a write to the status asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusChange {
    /// Nothing.
    None,
    /// Reset: everything here is as in the beginning again.
    Reset,
    /// DRIVER_OK is set now: start.
    DriverOk,
}

/// A part of a queue that the driver places in memory (virtio 1.2, section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingPart {
    /// The descriptor table.
    Descriptors,
    /// The available ring, or driver area.
    Available,
    /// The used ring, or device area.
    Used,
}

/// Which half of an address is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// The driver's side of a device. What a driver writes out of order, or out of range, has no effect.
#[derive(Debug)]
pub struct DriverView {
    offered: u64,
    status: u32,
    /// Index of the 32 feature bits that are read.
    device_select: u32,
    /// Index of the 32 feature bits that are written.
    driver_select: u32,
    accepted: u64,
    /// The driver accepted something from bit 64 on, where nothing is offered.
    accepted_beyond: bool,
    queue_select: u32,
    queues: Vec<Queue>,
}

impl DriverView {
    /// A driver that has said nothing yet, of a device that offers these features and queues. Fails for a
    /// greatest size that is no power of two.
    pub fn new(offered: u64, queue_max_sizes: &[u16]) -> Result<Self, virtio_queue::Error> {
        let queues = queue_max_sizes.iter().map(|&size| Queue::new(size)).collect::<Result<_, _>>()?;
        Ok(Self {
            offered,
            status: 0,
            device_select: 0,
            driver_select: 0,
            accepted: 0,
            accepted_beyond: false,
            queue_select: 0,
            queues,
        })
    }

    /// The status as the driver wrote it; DEVICE_NEEDS_RESET is the device's to add.
    pub fn status(&self) -> u32 {
        self.status
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_driver_ok(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK)
    }

    /// The driver writes the status. Bits are only added; 0 resets.
    pub fn set_status(&mut self, value: u32) -> StatusChange {
        if value == 0 {
            self.reset();
            return StatusChange::Reset;
        }
        if self.has(VIRTIO_CONFIG_S_FAILED) {
            return StatusChange::None;
        }
        self.status |= value & VIRTIO_CONFIG_S_FAILED;
        let was_ok = self.is_driver_ok();
        for step in STEPS {
            if self.has(step) {
                continue;
            }
            let refused = step == VIRTIO_CONFIG_S_FEATURES_OK && !self.features_acceptable();
            if value & step == 0 || refused {
                break;
            }
            self.status |= step;
        }
        match self.is_driver_ok() && !was_ok {
            true => StatusChange::DriverOk,
            false => StatusChange::None,
        }
    }

    /// The features that the driver accepted; all of them were offered once FEATURES_OK is set.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Selects which 32 bits [`Self::offered`] reads.
    pub fn select_offered(&mut self, select: u32) {
        self.device_select = select;
    }

    /// What [`Self::select_offered`] last selected.
    pub fn offered_select(&self) -> u32 {
        self.device_select
    }

    /// The selected 32 bits of the features offered.
    pub fn offered(&self) -> u32 {
        selected_half(self.offered, self.device_select)
    }

    /// Selects which 32 bits [`Self::accept`] writes.
    pub fn select_accepted(&mut self, select: u32) {
        self.driver_select = select;
    }

    /// What [`Self::select_accepted`] last selected.
    pub fn accepted_select(&self) -> u32 {
        self.driver_select
    }

    /// The selected 32 bits of the features accepted.
    pub fn accepted_selected(&self) -> u32 {
        selected_half(self.accepted, self.driver_select)
    }

    /// The driver accepts these features of the selected 32. Has an effect between DRIVER and FEATURES_OK.
    pub fn accept(&mut self, features: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        match self.driver_select {
            0 => self.accepted = with_half(self.accepted, Half::Low, features),
            1 => self.accepted = with_half(self.accepted, Half::High, features),
            _ => self.accepted_beyond |= features != 0,
        }
    }

    /// Selects the queue that the following methods are about. One that does not exist has size 0.
    pub fn select_queue(&mut self, index: u32) {
        self.queue_select = index;
    }

    /// What [`Self::select_queue`] last selected.
    pub fn queue_select(&self) -> u32 {
        self.queue_select
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The size of the selected queue as the driver set it, at first the greatest; 0 if there is no such queue.
    pub fn queue_size(&self) -> u16 {
        self.selected().map_or(0, Queue::size)
    }

    /// The greatest size of the selected queue in descriptors; 0 if there is no such queue.
    pub fn queue_max_size(&self) -> u16 {
        self.selected().map_or(0, Queue::max_size)
    }

    /// Whether the driver made the selected queue ready.
    pub fn is_queue_ready(&self) -> bool {
        self.selected().is_some_and(Queue::ready)
    }

    /// Sets the size of the selected queue: a power of two, at most the greatest.
    pub fn set_queue_size(&mut self, size: u32) {
        if let (Some(queue), Ok(size)) = (self.selected_idle(), u16::try_from(size)) {
            ignore_invalid(queue.try_set_size(size));
        }
    }

    /// Half an address of the selected queue.
    pub fn queue_address(&self, part: RingPart, which: Half) -> u32 {
        let address = |queue: &Queue| match part {
            RingPart::Descriptors => queue.desc_table(),
            RingPart::Available => queue.avail_ring(),
            RingPart::Used => queue.used_ring(),
        };
        self.selected().map_or(0, |queue| half(address(queue), which))
    }

    /// Sets half an address of the selected queue.
    pub fn set_queue_address(&mut self, part: RingPart, which: Half, value: u32) {
        let Some(queue) = self.selected_idle() else { return };
        let new = |old| GuestAddress(with_half(old, which, value));
        ignore_invalid(match part {
            RingPart::Descriptors => queue.try_set_desc_table_address(new(queue.desc_table())),
            RingPart::Available => queue.try_set_avail_ring_address(new(queue.avail_ring())),
            RingPart::Used => queue.try_set_used_ring_address(new(queue.used_ring())),
        });
    }

    /// Makes the selected queue ready, or not. A queue of a running device stays as it is until the reset:
    /// VIRTIO_F_RING_RESET is not offered.
    pub fn set_queue_ready(&mut self, ready: bool) {
        if self.may_configure()
            && let Some(queue) = self.selected_mut()
        {
            queue.set_ready(ready);
        }
    }

    /// A copy of each queue for the device to run, in order of the index; `None` where it is not ready.
    pub fn rings(&self) -> Vec<Option<Queue>> {
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let copy = |queue: &Queue| {
            // It does not fail: what made the queue has checked the same.
            let mut copy = Queue::try_from(queue.state()).ok()?;
            copy.set_event_idx(event_idx);
            queue.ready().then_some(copy)
        };
        self.queues.iter().map(copy).collect()
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_select = 0;
        self.driver_select = 0;
        self.accepted = 0;
        self.accepted_beyond = false;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(Queue::reset);
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0
            && !self.accepted_beyond
            && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK (section 3.1.1).
    fn may_configure(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.is_driver_ok() && !self.has(VIRTIO_CONFIG_S_FAILED)
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::try_from(self.queue_select).ok()?)
    }

    /// The selected queue if it may be set up, and is not ready.
    fn selected_idle(&mut self) -> Option<&mut Queue> {
        if !self.may_configure() {
            return None;
        }
        self.selected_mut().filter(|queue| !queue.ready())
    }
}

/// What the driver writes out of range has no effect; it is not worth more than a line for who debugs a
/// driver.
fn ignore_invalid(result: Result<(), virtio_queue::Error>) {
    if let Err(error) = result {
        log::debug!("ignored what a driver wrote about a queue: {error}");
    }
}

/// One half of `value`.
fn half(value: u64, which: Half) -> u32 {
    let [low, high] = halves(value);
    match which {
        Half::Low => low,
        Half::High => high,
    }
}

/// The half of `value` with this index; 0 for others.
fn selected_half(value: u64, select: u32) -> u32 {
    match select {
        0 => half(value, Half::Low),
        1 => half(value, Half::High),
        _ => 0,
    }
}

/// `value` with one half replaced.
fn with_half(value: u64, which: Half, new: u32) -> u64 {
    let [low, high] = halves(value);
    match which {
        Half::Low => u64::from(high) << 32 | u64::from(new),
        Half::High => u64::from(new) << 32 | u64::from(low),
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

#[cfg(test)]
mod tests;
