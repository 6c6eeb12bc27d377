//! What travels on the queues: a header, and behind it the bytes of a stream (virtio 1.2, section 5.10.6).

/// Bytes of the header before every packet's data.
pub(super) const HEADER_LEN: u32 = 44;
const HEADER_BYTES: usize = 44;

/// The address of the host (virtio 1.2, section 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// The type of a stream's packets, the only one here.
pub(super) const STREAM: u16 = 1;

/// Flag of a SHUTDOWN: its sender receives no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flag of a SHUTDOWN: its sender sends no more.
pub(super) const NO_SEND: u32 = 2;
/// Both flags: the connection is over, and the other side answers with RST.
pub(super) const NO_MORE: u32 = NO_RECEIVE | NO_SEND;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Open a connection.
    Request,
    /// It is open.
    Response,
    /// It is closed, or there is none.
    Reset,
    /// One direction ends, or both; see the flags.
    Shutdown,
    /// Bytes follow.
    Data,
    /// Only for its `buf_alloc` and `fwd_cnt`.
    CreditUpdate,
    /// Asks for a CREDIT_UPDATE.
    CreditRequest,
}

const OPS: [(u16, Op); 7] = [
    (1, Op::Request),
    (2, Op::Response),
    (3, Op::Reset),
    (4, Op::Shutdown),
    (5, Op::Data),
    (6, Op::CreditUpdate),
    (7, Op::CreditRequest),
];

impl Op {
    /// What `number` means; `None` if nothing.
    pub(super) fn from_number(number: u16) -> Option<Self> {
        OPS.iter().find(|(at, _)| *at == number).map(|(_, op)| *op)
    }

    /// The number in a header.
    pub(super) fn number(self) -> u16 {
        OPS.iter().find(|(_, op)| *op == self).map_or(0, |(number, _)| *number)
    }
}

/// A connection's two ends; the guest's context and the host's are the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    /// The host's port.
    pub(super) host: u32,
    /// The guest's port.
    pub(super) guest: u32,
}

/// A packet's header, field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    /// The type of socket.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How many bytes the sender has room for, all in all.
    pub(super) buf_alloc: u32,
    /// How many bytes the sender has taken out of that room so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A header from the host to `guest_cid` that says nothing but `op`.
    pub(super) fn to_guest(guest_cid: u64, ports: Ports, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: STREAM,
            op: op.number(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The connection that a packet of the guest's is about.
    pub(super) fn ports_from_guest(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }

    /// Reads the fields.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the fields.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The `N` bytes at `at`.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
