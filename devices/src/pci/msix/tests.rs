use super::*;
use crate::pci::fake_routes::FakeRoutes;

const MESSAGE: Message = Message { address: 0x1_FEE0_1004, data: 0x4021 };

fn msix(vectors: usize) -> (Msix, Arc<FakeRoutes>) {
    let routes = Arc::new(FakeRoutes::new(vectors));
    (Msix::new(routes.clone()), routes)
}

fn set(msix: &mut Msix, vector: usize, message: Message, masked: bool) {
    msix.write_table(vector * 16 + 12, &[1, 0, 0, 0]);
    msix.write_table(vector * 16, &message.address.to_le_bytes());
    msix.write_table(vector * 16 + 8, &message.data.to_le_bytes());
    msix.write_table(vector * 16 + 12, &[u8::from(masked), 0, 0, 0]);
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0x55; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn the_capability_says_how_many_and_where() {
    let (msix, _) = msix(3);
    let (body, writable) = msix.capability(0x4000, 0x5000);
    assert_eq!(body, [2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    assert_eq!(writable, [0, 0xC0]);
}

#[test]
fn a_vector_is_routed_when_nothing_masks_it() {
    let (mut msix, routes) = msix(2);
    set(&mut msix, 1, MESSAGE, false);
    assert_eq!(routes.take(), [] as [Vec<_>; 0], "MSI-X is off");
    msix.set_control(ENABLE | FUNCTION_MASK);
    assert_eq!(routes.take(), [] as [Vec<_>; 0], "the function is masked");
    msix.set_control(ENABLE);
    assert_eq!(routes.take(), [[None, Some(MESSAGE)]], "the other vector is masked");
    msix.set_control(ENABLE | FUNCTION_MASK);
    assert_eq!(routes.take(), [[None, None]]);
    msix.set_control(ENABLE);
    assert_eq!(routes.take().len(), 1);
    msix.write_table(16 + 12, &[1]);
    assert_eq!(routes.take(), [[None, None]]);
    msix.write_table(16 + 12, &[0, 0, 0, 0]);
    assert_eq!(routes.take().len(), 1);
    msix.set_control(0);
    assert_eq!(routes.take(), [[None, None]]);
}

#[test]
fn only_changes_are_routed_and_those_of_a_masked_vector_at_once() {
    let (mut msix, routes) = msix(2);
    msix.set_control(ENABLE);
    set(&mut msix, 0, MESSAGE, false);
    assert_eq!(routes.take(), [[Some(MESSAGE), None]], "four writes, one route");
    let other = Message { data: 0x4022, ..MESSAGE };
    set(&mut msix, 0, other, false);
    assert_eq!(routes.take(), [[None, None], [Some(other), None]]);
    msix.write_table(8, &other.data.to_le_bytes());
    set(&mut msix, 1, MESSAGE, true);
    msix.set_control(ENABLE);
    assert_eq!(routes.take(), [] as [Vec<_>; 0], "nothing is another");
    msix.write_table(8, &MESSAGE.data.to_le_bytes());
    assert_eq!(routes.take(), [[Some(MESSAGE), None]], "an unmasked vector's message changes too");
}

#[test]
fn what_is_masked_is_pending() {
    let (mut msix, routes) = msix(11);
    msix.set_control(ENABLE);
    set(&mut msix, 9, MESSAGE, true);
    assert_eq!(pending(&msix), 0);
    routes.irqfds()[9].write(1).unwrap();
    routes.irqfds()[10].write(1).unwrap();
    assert_eq!(pending(&msix), 0b110_0000_0000);
    let mut byte = [0];
    msix.read_pending(1, &mut byte);
    assert_eq!(byte, [0b110]);
    set(&mut msix, 9, MESSAGE, false);
    assert_eq!(routes.signals(9), 1, "it is there for who routes it");
    assert_eq!(pending(&msix), 1 << 10);
    msix.set_control(ENABLE | FUNCTION_MASK);
    routes.irqfds()[9].write(1).unwrap();
    assert_eq!(pending(&msix), 0b110_0000_0000);
}

#[test]
fn what_happens_while_it_is_off_is_forgotten() {
    let (mut msix, routes) = msix(1);
    routes.irqfds()[0].write(1).unwrap();
    assert_eq!(pending(&msix), 0);
    msix.set_control(ENABLE);
    assert_eq!((pending(&msix), routes.signals(0)), (0, 0));
}

#[test]
fn the_table_is_read_and_written_in_any_width() {
    let (mut msix, _) = msix(2);
    let read = |msix: &Msix, offset, len| {
        let mut data = vec![0x55; len];
        msix.read_table(offset, &mut data);
        data
    };
    assert_eq!(read(&msix, 0, 16), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    msix.write_table(0, &[0xFF; 32]);
    assert_eq!(read(&msix, 0, 4), [0xFC, 0xFF, 0xFF, 0xFF], "addresses are those of dwords");
    assert_eq!(read(&msix, 28, 4), [1, 0, 0, 0]);
    msix.write_table(13, &[0xFF; 3]);
    msix.write_table(12, &[0xFE]);
    assert_eq!(read(&msix, 12, 4), [0; 4]);
    msix.write_table(31, &[0xFF; 8]);
    msix.write_table(usize::MAX, &[0xFF; 8]);
    assert_eq!(read(&msix, 32, 8), [0; 8]);
    assert_eq!(read(&msix, usize::MAX, 8), [0; 8]);
    let mut data = [0x55; 8];
    msix.read_pending(usize::MAX, &mut data[..1]);
    msix.read_pending(0x7FFF_FFFF, &mut data[1..]);
    assert_eq!(data, [0; 8]);
}
