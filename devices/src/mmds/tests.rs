mod frames;
mod guest;

use serde_json::json;

use super::*;
use frames::{ACK, FIN, PSH, RST, Random, SYN, Segment, arp, next_sequence};
use guest::{ADDRESS, BUFFER, GUEST_MAC, Guest};
use smoltcp::socket::tcp::State;

const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
/// What `stack` and `link` bound.
const CONNECTIONS: usize = 30;
const WAITING: usize = 64;

fn mmds() -> Mmds {
    let mut mmds = Mmds::new(51_200);
    mmds.put(json!({"latest": {"meta-data": {"id": "i-1", "cores": 2}}})).unwrap();
    mmds
}

/// A document that takes many segments, with the one of [`mmds`] in it.
fn large() -> Mmds {
    let mut mmds = mmds();
    mmds.patch(json!({"large": "x".repeat(30_000)})).unwrap();
    mmds
}

fn frames_for_guest(port: &mut MmdsPort, now: Instant) -> Vec<Vec<u8>> {
    let mut buffer = [0; BUFFER];
    std::iter::from_fn(|| port.0.next_frame(&mut buffer, now).map(|len| buffer[..len].to_vec())).collect()
}

#[test]
fn frames_for_the_service_are_told_apart() {
    let port = MmdsPort::new(Arc::new(Mutex::new(mmds())), ADDRESS);
    let other = Ipv4Addr::new(169, 254, 169, 253);
    assert!(port.takes(&arp(1, GUEST, ADDRESS)));
    assert!(!port.takes(&arp(1, GUEST, other)));
    assert!(!port.takes(&arp(2, GUEST, ADDRESS)), "an ARP reply");
    let frame = Segment { flags: SYN, ..Segment::default() }.frame();
    assert!(port.takes(&frame));
    assert!(port.takes(&frame[..34]), "a broken packet must not reach the host's network either");
    let mut to_other = frame.clone();
    to_other[33] = 253;
    assert!(!port.takes(&to_other));
    let mut ipv6 = frame.clone();
    ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert!(!port.takes(&ipv6));
    for len in 0..34 {
        assert!(!port.takes(&frame[..len]), "{len} bytes");
    }
}

#[test]
fn arp_requests_are_answered_with_the_address_of_firecracker() {
    let mut port = MmdsPort::new(Arc::new(Mutex::new(mmds())), ADDRESS);
    // A guest that does not have an address yet asks too.
    for sender in [GUEST, Ipv4Addr::UNSPECIFIED] {
        port.from_guest(&arp(1, sender, ADDRESS));
        let frames = frames_for_guest(&mut port, Instant::now());
        let [reply] = frames.as_slice() else {
            panic!("{frames:?}");
        };
        let mac = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
        let expected = [
            &GUEST_MAC[..],
            &mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &mac,
            &ADDRESS.octets(),
            &GUEST_MAC,
            &sender.octets(),
        ];
        assert_eq!(*reply, expected.concat());
    }
}

#[test]
fn what_is_not_for_the_service_or_not_tcp_has_no_answer() {
    let mut port = MmdsPort::new(Arc::new(Mutex::new(mmds())), ADDRESS);
    port.from_guest(&arp(1, GUEST, GUEST));
    port.from_guest(&arp(2, GUEST, ADDRESS));
    let mut udp = Segment::default().frame();
    udp[23] = 17;
    port.from_guest(&udp);
    assert!(frames_for_guest(&mut port, Instant::now()).is_empty());
    assert_eq!(port.next_timer(), None);
}

#[test]
fn an_address_that_no_host_has_is_never_answered() {
    for address in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1)] {
        let mut port = MmdsPort::new(Arc::new(Mutex::new(mmds())), address);
        let mut frame = Segment { host: 2, port: 5000, flags: SYN, ..Segment::default() }.frame();
        frame[30..34].copy_from_slice(&address.octets());
        port.from_guest(&frame);
        assert!(frames_for_guest(&mut port, Instant::now()).is_empty());
    }
}

#[test]
fn a_guest_with_any_address_reads_metadata() {
    for address in [GUEST, Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(169, 254, 169, 253)] {
        let mut guest = Guest::new(mmds(), address);
        let reply = guest.ask("GET /latest/meta-data/id", "");
        assert_eq!((reply.status, reply.body.as_str()), (200, "i-1"));
        let reply = guest.ask("GET /latest/meta-data", "Accept: application/json\r\n");
        assert_eq!((reply.status, reply.body.as_str()), (200, r#"{"cores":2,"id":"i-1"}"#));
        assert_eq!(guest.ask("GET /latest/meta-data/", "").body, "cores\nid");
        assert_eq!(guest.ask("GET /latest/meta-data/cores", "").status, 501);
        assert_eq!(guest.ask("GET /later", "").status, 404);
        let reply = guest.ask("POST /latest", "");
        assert_eq!(reply.status, 405);
        assert!(reply.head.contains("\r\nAllow: GET, PUT\r\n"), "{}", reply.head);
        assert_eq!(guest.ask("GET /\x01", "").status, 400);
    }
}

#[test]
fn version_2_takes_a_token_and_sees_it_expire() {
    let mut guest = Guest::new(mmds(), GUEST);
    guest.mmds.lock().unwrap().set_version(Version::V2);
    assert_eq!(guest.ask("GET /latest/meta-data/id", "").status, 401);
    let ttl = "X-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(guest.ask("PUT /latest/api/token", &format!("{ttl}X-Forwarded-For: a\r\n")).status, 400);
    let token = guest.ask("PUT /latest/api/token", ttl);
    assert_eq!(token.status, 200);
    let header = format!("X-metadata-token: {}\r\n", token.body);
    assert_eq!(guest.ask("GET /latest/meta-data/id", &header).body, "i-1");
    guest.now += Duration::from_secs(60);
    assert_eq!(guest.ask("GET /latest/meta-data/id", &header).status, 401);
}

#[test]
fn the_guest_sees_changes() {
    let mut guest = Guest::new(Mmds::new(100), GUEST);
    assert_eq!(guest.ask("GET /", "").status, 404);
    guest.mmds.lock().unwrap().put(json!({"a": "1"})).unwrap();
    assert_eq!(guest.ask("GET /a", "").body, "1");
    guest.mmds.lock().unwrap().patch(json!({"a": "2"})).unwrap();
    assert_eq!(guest.ask("GET /a", "").body, "2");
}

#[test]
fn a_large_value_arrives_whole() {
    let mut random = Random(1);
    let text: String = (0..50_000).map(|_| char::from(b'a' + random.byte() % 26)).collect();
    let mut mmds = Mmds::new(51_200);
    mmds.put(json!({"large": text})).unwrap();
    let mut guest = Guest::new(mmds, GUEST);
    assert_eq!(guest.ask("GET /large", "").body, text);
}

#[test]
fn a_connection_serves_requests_one_after_another() {
    let mut guest = Guest::new(mmds(), GUEST);
    let handle = guest.established();
    let (get, last) =
        ("GET /latest/meta-data/id HTTP/1.1\r\n\r\n", "GET /x HTTP/1.1\r\nConnection: close\r\n\r\n");
    // More than the buffers hold, so that the requests wrap around in them.
    let count = 300;
    guest.send(handle, get.repeat(count).as_bytes());
    for index in 0..count {
        let reply = guest.reply(handle);
        assert_eq!((reply.status, reply.body.as_str()), (200, "i-1"), "request {index}");
        assert!(reply.head.contains("Connection: keep-alive"), "{}", reply.head);
    }
    guest.send(handle, last.as_bytes());
    let reply = guest.reply(handle);
    assert_eq!(reply.status, 404);
    assert!(reply.head.contains("Connection: close"), "{}", reply.head);
    guest.until(|guest| guest.socket(handle).state() == State::CloseWait);
}

#[test]
fn a_request_may_come_byte_by_byte_and_not_be_too_large() {
    let mut guest = Guest::new(mmds(), GUEST);
    let handle = guest.established();
    for byte in b"GET /latest/meta-data/id HTTP/1.1\r\n\r\n" {
        guest.send(handle, &[*byte]);
        guest.step();
    }
    assert_eq!(guest.reply(handle).body, "i-1");
    guest.send(handle, &[b'G'; 5000]);
    assert_eq!(guest.reply(handle).status, 431);
    guest.until(|guest| guest.socket(handle).state() == State::CloseWait);
}

#[test]
fn a_guest_that_has_said_all_is_answered_and_closed() {
    let mut guest = Guest::new(mmds(), GUEST);
    for (request, status) in [("GET /x HTTP/1.1\r\n\r\n", Some(404)), ("GET /x HTTP/1.1\r\n", None)] {
        let handle = guest.established();
        guest.send(handle, request.as_bytes());
        guest.socket(handle).close();
        if let Some(status) = status {
            assert_eq!(guest.reply(handle).status, status);
        }
        guest.until(|guest| !guest.socket(handle).is_active());
    }
}

#[test]
fn many_connections_are_served_and_too_many_replace_the_slowest() {
    let mut guest = Guest::new(mmds(), GUEST);
    for _ in 0..3 * CONNECTIONS {
        assert_eq!(guest.ask("GET /latest/meta-data/id", "Connection: close\r\n").status, 200);
    }
    let handles: Vec<_> = (0..CONNECTIONS).map(|_| guest.established()).collect();
    let refused = guest.connect();
    guest.until(|guest| guest.socket(refused).state() == State::Closed);
    for handle in &handles {
        guest.send(*handle, b"GET /latest/meta-data/id HTTP/1.1\r\n\r\n");
        assert_eq!(guest.reply(*handle).status, 200);
    }
    guest.now += Duration::from_secs(11);
    assert_eq!(guest.ask("GET /latest/meta-data/id", "").status, 200);
    // The first connection had waited longest.
    guest.send(handles[0], b"GET / HTTP/1.1\r\n\r\n");
    guest.until(|guest| guest.socket(handles[0]).state() == State::Closed);
    let youngest = handles[CONNECTIONS - 1];
    guest.send(youngest, b"GET /latest/meta-data/id HTTP/1.1\r\n\r\n");
    assert_eq!(guest.reply(youngest).status, 200);
}

#[test]
fn connections_that_were_never_opened_or_used_are_given_up() {
    let mut guest = Guest::new(mmds(), GUEST);
    for port in 0..1000 {
        let frame =
            Segment { host: 3, port: 1000 + port, flags: SYN, window: 1000, ..Segment::default() }.frame();
        guest.port.0.receive(&frame, guest.now);
    }
    let idle = guest.connect();
    guest.until(|guest| guest.socket(idle).state() == State::Closed);
    guest.now += Duration::from_secs(11);
    let idle = guest.established();
    guest.now += Duration::from_secs(61);
    guest.until(|guest| guest.socket(idle).state() == State::Closed);
}

#[test]
fn what_is_not_acknowledged_is_sent_again() {
    let (mut port, now) = (MmdsPort::new(Arc::new(Mutex::new(mmds())), ADDRESS), Instant::now());
    assert_eq!(port.0.next_timer(now), None);
    port.0
        .receive(&Segment { host: 2, port: 5, flags: SYN, window: 1000, ..Segment::default() }.frame(), now);
    assert_eq!(port.0.next_timer(now), None, "the guest has a frame to take");
    let first = frames_for_guest(&mut port, Instant::now());
    assert_eq!(first.len(), 1);
    let delay = port.0.next_timer(now).unwrap();
    assert!((Duration::from_millis(10)..Duration::from_secs(5)).contains(&delay), "{delay:?}");
    port.0.run(now + delay);
    assert_eq!(frames_for_guest(&mut port, Instant::now()), first);
}

#[test]
fn a_guest_that_takes_no_frames_fills_no_memory() {
    let mut port = MmdsPort::new(Arc::new(Mutex::new(mmds())), ADDRESS);
    for port_number in 0..500 {
        port.from_guest(&arp(1, GUEST, ADDRESS));
        port.from_guest(&Segment { host: 2, port: port_number, flags: ACK, ..Segment::default() }.frame());
    }
    assert_eq!(frames_for_guest(&mut port, Instant::now()).len(), WAITING);
    // A frame that does not fit is lost, and the next is not.
    port.from_guest(&arp(1, GUEST, ADDRESS));
    assert_eq!(port.to_guest(&mut [0; 41]), None);
    port.from_guest(&arp(1, GUEST, ADDRESS));
    assert_eq!(port.to_guest(&mut [0; 42]), Some(42));
}

#[test]
fn what_found_no_room_follows_as_soon_as_there_is_some() {
    let mut guest = Guest::new(mmds(), GUEST);
    let handle = guest.established();
    for _ in 0..WAITING {
        guest.port.0.receive(&arp(1, GUEST, ADDRESS), guest.now);
    }
    let before = guest.now;
    guest.send(handle, b"GET /latest/meta-data/id HTTP/1.1\r\n\r\n");
    assert_eq!(guest.reply(handle).body, "i-1");
    // One step in which nothing moves, that of the guest's stack which looks at what has come.
    assert!(guest.now - before <= Duration::from_millis(10), "it took a timer");
}

#[test]
fn rubbish_is_survived() {
    let mut random = Random(0x5eed);
    let mut guest = Guest::new(mmds(), GUEST);
    for _ in 0..20_000 {
        let len = random.below(200);
        let mut frame = random.bytes(len);
        // Most would be recognised as foreign, so the fields that make them ours are mended in turn.
        for (at, ours) in
            [(12, &[8, 0][..]), (14, &[0x45]), (23, &[6]), (30, &ADDRESS.octets()), (36, &[0, 80])]
        {
            if let Some(field) = frame.get_mut(at..at + ours.len())
                && random.below(8) != 0
            {
                field.copy_from_slice(ours);
            }
        }
        guest.port.0.receive(&frame, guest.now);
        if random.below(4) == 0 {
            frames_for_guest(&mut guest.port, guest.now);
        }
    }
    guest.now += Duration::from_secs(61);
    assert_eq!(guest.ask("GET /latest/meta-data/id", "").body, "i-1");
}

/// Segments that are nearly right: of few connections, about where their sequence numbers are.
#[test]
fn a_hostile_tcp_is_survived() {
    torment(1, 20_000);
}

/// Peers of the hostile guest.
const PEERS: usize = 8;

fn torment(seed: u64, segments: u32) {
    let mut random = Random(seed);
    let mut guest = Guest::new(large(), GUEST);
    let mut with_data = 0;
    let mut expected = [0; PEERS];
    let mut next = [0_u32; PEERS];
    let requests: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n",
        b"GET /latest/meta-data/id HTTP/1.0\r\n\r\n",
        b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 5\r\n\r\n",
        b"GET /",
        b"\r\n",
    ];
    // Mostly what keeps a connection going, so that the rest meets it in all its states.
    let often = [SYN, ACK, ACK, ACK, ACK | PSH, ACK | PSH];
    let seldom = [ACK | FIN, ACK | PSH | FIN, RST, RST | ACK, SYN | ACK, SYN | FIN, 0, 0xff];
    for _ in 0..segments {
        let index = usize::from(random.byte()) % PEERS;
        let mut segment = Segment {
            host: 5,
            port: 2000 + u16::try_from(index).unwrap(),
            flags: if random.below(16) == 0 { *random.pick(&seldom) } else { *random.pick(&often) },
            window: *random.pick(&[0, 1, 100, 1000, 9000, 65_535]),
            sequence: next[index],
            acknowledged: expected[index],
            ..Segment::default()
        };
        match random.below(64) {
            0 => segment.sequence = random.word(),
            1 => segment.acknowledged = random.word(),
            2 => segment.sequence = segment.sequence.wrapping_sub(random.word() % 3000),
            3 => segment.sequence = segment.sequence.wrapping_add(random.word() % 3000),
            4 => segment.acknowledged = segment.acknowledged.wrapping_sub(random.word() % 9000),
            5 => segment.acknowledged = segment.acknowledged.wrapping_add(random.word() % 9000),
            6 => segment.urgent = random.short(),
            7 => {
                let len = 4 * random.below(11);
                segment.options = random.bytes(len);
            }
            8 => segment.options = vec![2, 4, 0, random.byte(), 3, 3, random.byte(), 0],
            _ => {}
        }
        if segment.flags & (PSH | FIN) != 0 || random.below(8) == 0 {
            segment.payload = match random.below(8) {
                0 => {
                    let len = random.below(5000);
                    random.bytes(len)
                }
                _ => random.pick(&requests).repeat(usize::try_from(random.below(4)).unwrap()),
            };
        }
        let len = u32::try_from(segment.payload.len()).unwrap();
        guest.port.0.receive(&segment.frame(), guest.now);
        if random.below(16) != 0 {
            next[index] = segment.sequence.wrapping_add(len + u32::from(segment.flags & (SYN | FIN) != 0));
        }
        if random.below(3) == 0 {
            for frame in frames_for_guest(&mut guest.port, guest.now) {
                let index = usize::from(u16::from_be_bytes([frame[36], frame[37]]) - 2000);
                expected[index] = next_sequence(&frame).unwrap();
                with_data += u32::from(frame.len() > 100);
            }
        }
        guest.now += match random.below(64) {
            0 => Duration::from_secs(random.below(30)),
            1..8 => Duration::from_millis(random.below(2000)),
            _ => Duration::ZERO,
        };
        if random.below(8) == 0 {
            guest.port.0.run(guest.now);
        }
        if let Some(delay) = guest.port.0.next_timer(guest.now) {
            assert!(delay >= Duration::from_millis(10));
        }
    }
    assert!(with_data > segments / 20, "hardly a request got through: {with_data} segments with data");
    frames_for_guest(&mut guest.port, guest.now);
    guest.now += Duration::from_secs(61);
    guest.port.0.run(guest.now);
    frames_for_guest(&mut guest.port, guest.now);
    assert_eq!(guest.ask("GET /latest/meta-data/id", "").body, "i-1");
}
