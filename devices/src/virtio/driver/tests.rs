use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const OFFERED: u64 = VERSION_1 | EVENT_IDX | 0x21;

fn view() -> DriverView {
    DriverView::new(OFFERED, &[256, 16]).unwrap()
}

fn accept(view: &mut DriverView, features: u64) {
    view.select_accepted(0);
    view.accept(half(features, Half::Low));
    view.select_accepted(1);
    view.accept(half(features, Half::High));
}

/// A view with FEATURES_OK.
fn negotiated() -> DriverView {
    let mut view = view();
    view.set_status(3);
    accept(&mut view, VERSION_1);
    view.set_status(11);
    assert_eq!(view.status(), 11);
    view
}

#[test]
fn the_usual_way() {
    let mut view = view();
    assert_eq!(view.set_status(1), StatusChange::None);
    assert_eq!(view.set_status(3), StatusChange::None);
    view.select_offered(0);
    assert_eq!(view.offered(), 0x2000_0021);
    view.select_offered(1);
    assert_eq!(view.offered(), 1);
    view.select_offered(2);
    assert_eq!(view.offered(), 0);
    accept(&mut view, VERSION_1 | 1);
    assert_eq!(view.set_status(11), StatusChange::None);
    assert_eq!(view.status(), 11);
    assert_eq!(view.accepted(), VERSION_1 | 1);
    assert_eq!(view.set_status(15), StatusChange::DriverOk);
    assert!(view.is_driver_ok());
    assert_eq!(view.set_status(15), StatusChange::None, "only once");
    assert_eq!(view.set_status(0), StatusChange::Reset);
    assert_eq!((view.status(), view.accepted()), (0, 0));
}

#[test]
fn steps_cannot_be_left_out_or_undone() {
    for value in [2, 4, 8, 14, 12, 64] {
        let mut view = view();
        assert_eq!(view.set_status(value), StatusChange::None);
        assert_eq!(view.status(), 0, "{value}");
    }
    let mut view = negotiated();
    view.set_status(1);
    assert_eq!(view.status(), 11);
    view.set_status(11 | 64);
    assert_eq!(view.status(), 11, "DEVICE_NEEDS_RESET is not the driver's");
    view.set_status(0xffff_ff00);
    assert_eq!(view.status(), 11);
}

#[test]
fn features_must_be_offered_and_modern() {
    for (features, fine) in [
        (VERSION_1, true),
        (OFFERED, true),
        (0, false),
        (1, false),
        (VERSION_1 | 2, false),
        (VERSION_1 | 1 << 34, false),
        (u64::MAX, false),
    ] {
        let mut view = view();
        view.set_status(3);
        accept(&mut view, features);
        view.set_status(11);
        assert_eq!(view.status(), if fine { 11 } else { 3 }, "{features:#x}");
        assert_eq!(view.set_status(15), if fine { StatusChange::DriverOk } else { StatusChange::None });
    }
}

#[test]
fn features_beyond_64_are_not_offered() {
    let mut view = view();
    view.set_status(3);
    accept(&mut view, VERSION_1);
    view.select_accepted(2);
    view.accept(0);
    view.select_accepted(u32::MAX);
    view.accept(1);
    view.set_status(11);
    assert_eq!(view.status(), 3);
    view.set_status(0);
    view.set_status(3);
    accept(&mut view, VERSION_1);
    view.set_status(11);
    assert_eq!(view.status(), 11);
}

#[test]
fn features_can_be_accepted_only_in_time() {
    let mut view = view();
    accept(&mut view, VERSION_1);
    assert_eq!(view.accepted(), 0, "before DRIVER");
    let mut view = negotiated();
    accept(&mut view, OFFERED);
    assert_eq!(view.accepted(), VERSION_1, "after FEATURES_OK");
}

#[test]
fn a_driver_that_failed_can_only_reset() {
    let mut view = negotiated();
    view.set_status(128);
    assert_eq!(view.status(), 139);
    assert_eq!(view.set_status(15), StatusChange::None);
    view.set_queue_ready(true);
    assert!(!view.is_queue_ready());
    view.set_status(0);
    assert_eq!(view.status(), 0);
}

fn set_up(view: &mut DriverView, index: u32) {
    view.select_queue(index);
    view.set_queue_size(8);
    view.set_queue_address(RingPart::Descriptors, Half::Low, 0x1000);
    view.set_queue_address(RingPart::Descriptors, Half::High, 1);
    view.set_queue_address(RingPart::Available, Half::Low, 0x2000);
    view.set_queue_address(RingPart::Available, Half::High, 2);
    view.set_queue_address(RingPart::Used, Half::Low, 0x3000);
    view.set_queue_address(RingPart::Used, Half::High, 3);
    view.set_queue_ready(true);
}

#[test]
fn queues_are_set_up() {
    let mut view = negotiated();
    set_up(&mut view, 1);
    let rings = view.rings();
    assert!(rings[0].is_none());
    let ring = rings[1].as_ref().unwrap();
    assert_eq!(
        (ring.size(), ring.desc_table(), ring.avail_ring(), ring.used_ring(), ring.ready()),
        (8, 0x1_0000_1000, 0x2_0000_2000, 0x3_0000_3000, true)
    );
    assert!(!ring.event_idx_enabled());

    view.set_queue_size(16);
    view.set_queue_address(RingPart::Used, Half::Low, 0x4000);
    assert_eq!(view.rings()[1], rings[1], "a ready queue stays");
    view.set_queue_ready(false);
    view.set_queue_size(16);
    view.set_queue_ready(true);
    assert_eq!(view.rings()[1].as_ref().unwrap().size(), 16);

    view.set_status(15);
    view.set_queue_ready(false);
    assert!(view.is_queue_ready(), "a running queue stays");
    view.set_status(0);
    assert!(!view.is_queue_ready());
}

#[test]
fn event_idx_is_passed_on() {
    let mut view = view();
    view.set_status(3);
    accept(&mut view, OFFERED);
    view.set_status(11);
    set_up(&mut view, 0);
    assert!(view.rings()[0].as_ref().unwrap().event_idx_enabled());
}

#[test]
fn queues_cannot_be_set_up_out_of_time() {
    let mut view = view();
    for status in [0, 1, 3] {
        view.set_status(status);
        set_up(&mut view, 0);
        assert!(!view.is_queue_ready(), "{status}");
    }
}

#[test]
fn queues_that_do_not_exist_have_no_size() {
    let mut view = negotiated();
    for (index, size) in [(0, 256), (1, 16), (2, 0), (u32::MAX, 0)] {
        view.select_queue(index);
        assert_eq!(view.queue_max_size(), size);
    }
    set_up(&mut view, 2);
    assert!(!view.is_queue_ready());
    assert_eq!(view.rings(), [None, None]);
}

#[test]
fn sizes_and_addresses_out_of_range_are_ignored() {
    let mut view = negotiated();
    set_up(&mut view, 0);
    let before = view.rings();
    view.set_queue_ready(false);
    for size in [0, 3, 512, 0x1_0000, 0x1_0008, u32::MAX] {
        view.set_queue_size(size);
    }
    view.set_queue_address(RingPart::Descriptors, Half::Low, 0x1008);
    view.set_queue_address(RingPart::Available, Half::Low, 0x2001);
    view.set_queue_address(RingPart::Used, Half::Low, 0x3002);
    view.set_queue_ready(true);
    assert_eq!(view.rings(), before);
}

#[test]
fn a_device_cannot_offer_odd_sizes() {
    assert!(DriverView::new(0, &[0]).is_err());
    assert!(DriverView::new(0, &[3]).is_err());
}
