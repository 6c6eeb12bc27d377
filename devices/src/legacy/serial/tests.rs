use std::sync::Mutex;
use std::time::Duration;

use super::*;

const DATA: u64 = 0;
const IER: u64 = 1;
const MCR: u64 = 4;
const LSR: u64 = 5;

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial(output: impl Write + Send + 'static) -> (Serial, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    (Serial::new(irq.try_clone().unwrap(), Box::new(output), None).unwrap(), irq)
}

fn read(serial: &mut Serial, offset: u64) -> u8 {
    let mut byte = [0x55];
    serial.read(offset, &mut byte);
    byte[0]
}

#[test]
fn output_arrives() {
    let output = Output::default();
    let (mut serial, _irq) = serial(output.clone());
    for byte in b"login: " {
        serial.write(DATA, &[*byte]);
    }
    assert_eq!(*output.0.lock().unwrap(), b"login: ");
    assert_eq!(serial.observer.counters.missed_write_count.count(), 0);
}

#[test]
fn output_that_is_not_taken_is_counted_and_the_interrupt_still_comes() {
    let (mut serial, irq) = serial(Full);
    serial.write(IER, &[2]);
    assert!(irq.read().is_ok());
    // Reading the interrupt's identity acknowledges it.
    read(&mut serial, 2);
    serial.write(DATA, b"x");
    assert!(irq.read().is_ok());
    serial.write(DATA, b"y");
    assert_eq!(serial.observer.counters.missed_write_count.count(), 2);
    assert_ne!(read(&mut serial, LSR) & 0x20, 0, "the transmitter is ready");
}

#[test]
fn input_stops_when_full_and_goes_on_when_drained() {
    let (mut serial, irq) = serial(io::sink());
    serial.write(IER, &[1]);
    let _ = irq.read();
    let room = serial.room();
    assert_eq!(serial.input(&vec![b'a'; room - 1]), room - 1);
    assert!(irq.read().is_ok());
    assert_eq!(serial.input(b"bc"), 1);
    assert_eq!((serial.room(), serial.input(b"c")), (0, 0));

    for _ in 0..room - 1 {
        assert_eq!(read(&mut serial, DATA), b'a');
    }
    assert!(serial.observer.room.read().is_err(), "not yet");
    assert_eq!(read(&mut serial, DATA), b'b');
    assert_eq!(serial.room(), room);
    assert!(serial.observer.room.read().is_ok());
    read(&mut serial, DATA);
    serial.drain_room_event();
    assert!(serial.observer.room.read().is_err());
}

#[test]
fn loopback_takes_no_input() {
    let (mut serial, _irq) = serial(io::sink());
    serial.write(MCR, &[0x10]);
    assert_eq!(serial.input(b"abc"), 0);
    // A guest that talks to itself for ever fills its FIFO, and nothing else.
    for _ in 0..1000 {
        serial.write(DATA, b"x");
    }
    assert_eq!(serial.room(), 0);
}

#[test]
fn ports_are_a_byte_wide() {
    let output = Output::default();
    let (mut serial, _irq) = serial(output.clone());
    serial.write(DATA, b"xy");
    serial.write(DATA, b"");
    serial.write(0x100, b"x");
    assert!(output.0.lock().unwrap().is_empty());
    let mut data = [0; 2];
    serial.read(DATA, &mut data);
    assert_eq!(data, [0xff; 2]);
    serial.read(0x100, &mut data[..1]);
}

/// A port with a limit and a clock that stands still, and that clock.
fn limited(output: Output, limit: TokenBucket) -> (Serial, Arc<Mutex<Instant>>) {
    let now = Arc::new(Mutex::new(Instant::now()));
    let clock = Arc::clone(&now);
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let clock = Box::new(move || *clock.lock().unwrap());
    (Serial::with_clock(irq, Box::new(output), Some(limit), clock).unwrap(), now)
}

fn send(serial: &mut Serial, bytes: &[u8]) {
    bytes.iter().for_each(|byte| serial.write(DATA, &[*byte]));
}

#[test]
fn what_is_beyond_the_limit_is_dropped_and_counted() {
    let output = Output::default();
    let limit = TokenBucket { size: 4, refill_time: 1000, one_time_burst: Some(2) };
    let (mut serial, now) = limited(output.clone(), limit);
    send(&mut serial, b"0123456789");
    assert_eq!(*output.0.lock().unwrap(), b"012345", "the burst and the bucket");
    assert_eq!(
        (
            serial.observer.counters.rate_limiter_dropped_bytes.count(),
            serial.observer.counters.missed_write_count.count()
        ),
        (4, 0)
    );

    *now.lock().unwrap() += Duration::from_millis(500);
    send(&mut serial, b"abcd");
    assert_eq!(*output.0.lock().unwrap(), b"012345ab");
    // However long it is idle, the bucket holds no more, and the burst does not come back.
    *now.lock().unwrap() += Duration::from_hours(1_000_000);
    send(&mut serial, b"ABCDEFG");
    assert_eq!(*output.0.lock().unwrap(), b"012345abABCD");
    assert_eq!(serial.observer.counters.rate_limiter_dropped_bytes.count(), 4 + 2 + 3);
}

#[test]
fn tokens_come_back_however_often_bytes_come() {
    let output = Output::default();
    let limit = TokenBucket { size: 3, refill_time: 1, one_time_burst: None };
    let (mut serial, now) = limited(output.clone(), limit);
    send(&mut serial, b"xxxx");
    assert_eq!(output.0.lock().unwrap().len(), 3);
    // A byte a microsecond, at three tokens a millisecond, which is none in any of these steps alone.
    for _ in 0..10_000 {
        *now.lock().unwrap() += Duration::from_micros(1);
        send(&mut serial, b"x");
    }
    assert_eq!(output.0.lock().unwrap().len(), 3 + 30);
    assert_eq!(serial.observer.counters.rate_limiter_dropped_bytes.count(), 1 + 10_000 - 30);
    // A clock that goes back gives nothing.
    *now.lock().unwrap() -= Duration::from_micros(500);
    send(&mut serial, b"x");
    assert_eq!(output.0.lock().unwrap().len(), 33);
}

#[test]
fn limits_of_any_size() {
    for (size, refill_time) in [(u64::MAX, u64::MAX), (u64::MAX, 1), (0, 0), (0, 5), (5, 0)] {
        let output = Output::default();
        let limit = TokenBucket { size, refill_time, one_time_burst: Some(u64::MAX) };
        let (mut serial, now) = limited(output.clone(), limit);
        send(&mut serial, b"ab");
        *now.lock().unwrap() += Duration::from_hours(1_000_000);
        send(&mut serial, b"cd");
        assert_eq!(*output.0.lock().unwrap(), b"abcd");
        assert_eq!(serial.observer.counters.rate_limiter_dropped_bytes.count(), 0);
    }
    // The same without the burst, which comes first.
    let limit = TokenBucket { size: u64::MAX, refill_time: u64::MAX, one_time_burst: None };
    let output = Output::default();
    let (mut serial, now) = limited(output.clone(), limit);
    send(&mut serial, b"ab");
    *now.lock().unwrap() += Duration::from_hours(1_000_000);
    send(&mut serial, b"cd");
    assert_eq!(*output.0.lock().unwrap(), b"abcd");
    let limit = TokenBucket { size: 1, refill_time: u64::MAX, one_time_burst: None };
    let output = Output::default();
    let (mut serial, _now) = limited(output.clone(), limit);
    send(&mut serial, b"ab");
    assert_eq!(*output.0.lock().unwrap(), b"a");
}
