//! Records of an established TLS connection: sealed in batches for sending, opened in place in the receive buffer.
//!
//! rustls derives the keys, and seals and opens the records; this module connects rustls to a socket. The two
//! directions share only the source of new keys, so that one thread can read while another one writes.

use std::fmt;
use std::ops::Range;

use parking_lot::Mutex;
use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, ProtocolVersion, Tls13CipherSuite,
};

use super::TlsError;
use crate::wire::WireError;

/// Maximum number of data bytes of a record (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;
/// Number of bytes before the sealed part of a record, which contain type, version and length.
const HEADER: usize = 5;
/// Maximum size in bytes of the sealed part of a record (RFC 8446, 5.2).
const MAX_SEALED: usize = RECORD + 256;
/// Maximum number of records that are sent together.
const BATCH: usize = 16;
/// Size of the receive buffer in bytes.
const INCOMING: usize = 256 << 10;
/// Maximum number of records per key: 128 GiB of data, about a third of the limit for AES-GCM (RFC 8446, 5.5).
const RECORDS_PER_KEY: u64 = 1 << 23;
/// KeyUpdate message: changes the sender's key without requesting a change of the receiver's key (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Source of new traffic keys.
pub(super) enum Keys {
    Connecting(KernelConnection<ClientConnectionData>),
    Accepting(KernelConnection<ServerConnectionData>),
}

impl Keys {
    fn suite(&self) -> Result<&'static Tls13CipherSuite, TlsError> {
        let suite = match self {
            Self::Connecting(keys) => keys.negotiated_cipher_suite(),
            Self::Accepting(keys) => keys.negotiated_cipher_suite(),
        };
        suite.tls13().ok_or(TlsError::Unexpected("an older version of TLS"))
    }

    fn next_out(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Connecting(keys) => keys.update_tx_secret(),
            Self::Accepting(keys) => keys.update_tx_secret(),
        }
    }

    fn next_in(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Connecting(keys) => keys.update_rx_secret(),
            Self::Accepting(keys) => keys.update_rx_secret(),
        }
    }
}

/// Both directions of an established connection.
pub(in crate::wire) struct Records {
    suite: &'static Tls13CipherSuite,
    keys: Mutex<Keys>,
    outgoing: Mutex<Outgoing>,
    incoming: Mutex<Incoming>,
    records_per_key: u64,
}

struct Outgoing {
    sealer: Box<dyn MessageEncrypter>,
    sequence: u64,
}

struct Incoming {
    opener: Box<dyn MessageDecrypter>,
    sequence: u64,
    buffer: Box<[u8]>,
    /// Opened bytes that have not been read.
    plain: Range<usize>,
    /// Sealed bytes, which follow `plain`.
    sealed: Range<usize>,
}

impl Records {
    /// Creates the record layer. `plain` contains the opened bytes received so far, `sealed` the bytes that have not
    /// been opened.
    ///
    /// # Errors
    /// If the peer has sent more than the buffer holds, or if rustls does not support the cipher.
    pub(super) fn new(secrets: ExtractedSecrets, keys: Keys, plain: &[u8], sealed: &[u8]) -> Result<Self, TlsError> {
        let suite = keys.suite()?;
        let mut buffer = vec![0; INCOMING].into_boxed_slice();
        let end = plain.len() + sealed.len();
        if end > buffer.len() {
            return Err(TlsError::TooMuch);
        }
        buffer[..plain.len()].copy_from_slice(plain);
        buffer[plain.len()..end].copy_from_slice(sealed);
        let outgoing = Outgoing { sealer: sealer(suite, secrets.tx.1)?, sequence: secrets.tx.0 };
        let (opener, sequence) = (opener(suite, secrets.rx.1)?, secrets.rx.0);
        let incoming = Incoming { opener, sequence, buffer, plain: 0..plain.len(), sealed: plain.len()..end };
        let (keys, outgoing, incoming) = (Mutex::new(keys), Mutex::new(outgoing), Mutex::new(incoming));
        Ok(Self { suite, keys, outgoing, incoming, records_per_key: RECORDS_PER_KEY })
    }

    /// Seals `parts` in order and passes the records to `send`, which must send all of them.
    pub(in crate::wire) fn write(
        &self,
        parts: &[&[u8]],
        mut send: impl FnMut(&[Vec<u8>]) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let mut outgoing = self.outgoing.lock();
        let mut rest = OutboundChunks::new(parts);
        let mut batch = Vec::with_capacity(BATCH + 1);
        while !rest.is_empty() {
            if outgoing.sequence >= self.records_per_key {
                batch.push(self.change_key(&mut outgoing)?);
            }
            let (record, after) = rest.split_at(RECORD);
            batch.push(outgoing.seal(ContentType::ApplicationData, record)?);
            rest = after;
            if batch.len() >= BATCH || rest.is_empty() {
                send(&batch)?;
                batch.clear();
            }
        }
        Ok(())
    }

    /// Fills all of `buffers`. `receive` must store at least one byte in the given slice, and return the number of
    /// bytes.
    ///
    /// # Safety
    /// Every buffer must be valid for writing.
    pub(in crate::wire) unsafe fn read(
        &self,
        buffers: &[libc::iovec],
        mut receive: impl FnMut(&mut [u8]) -> Result<usize, WireError>,
    ) -> Result<(), WireError> {
        let mut incoming = self.incoming.lock();
        for buffer in buffers {
            let mut done = 0;
            while done < buffer.iov_len {
                if incoming.plain.is_empty() {
                    self.next_record(&mut incoming, &mut receive)?;
                    continue;
                }
                let chunk = incoming.take(buffer.iov_len - done);
                // SAFETY: the target lies within the buffer, which the caller guarantees to be writable. `chunk` is a
                // slice of our receive buffer, which does not overlap the target.
                unsafe {
                    std::ptr::copy_nonoverlapping(chunk.as_ptr(), buffer.iov_base.cast::<u8>().add(done), chunk.len());
                };
                done += chunk.len();
            }
        }
        Ok(())
    }

    /// Reads the opened bytes that are available, up to `bytes.len()`, after waiting for at least one. Returns their
    /// number. `receive`: as for `read`.
    pub(in crate::wire) fn read_available(
        &self,
        bytes: &mut [u8],
        mut receive: impl FnMut(&mut [u8]) -> Result<usize, WireError>,
    ) -> Result<usize, WireError> {
        let mut incoming = self.incoming.lock();
        while incoming.plain.is_empty() {
            self.next_record(&mut incoming, &mut receive)?;
        }
        let chunk = incoming.take(bytes.len());
        bytes[..chunk.len()].copy_from_slice(chunk);
        Ok(chunk.len())
    }

    #[cfg(test)]
    pub(super) fn records_per_key(&mut self, records: u64) {
        self.records_per_key = records;
    }

    fn change_key(&self, outgoing: &mut Outgoing) -> Result<Vec<u8>, TlsError> {
        let message = outgoing.seal(ContentType::Handshake, OutboundChunks::Single(&KEY_UPDATE))?;
        let (sequence, secrets) = self.keys.lock().next_out()?;
        *outgoing = Outgoing { sealer: sealer(self.suite, secrets)?, sequence };
        Ok(message)
    }

    fn next_record(
        &self,
        incoming: &mut Incoming,
        receive: &mut impl FnMut(&mut [u8]) -> Result<usize, WireError>,
    ) -> Result<(), WireError> {
        incoming.fill(HEADER, receive)?;
        let header = &incoming.buffer[incoming.sealed.start..][..HEADER];
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != u8::from(ContentType::ApplicationData) {
            return Err(TlsError::Unexpected("an unsealed record").into());
        }
        if len > MAX_SEALED {
            return Err(TlsError::from(Error::PeerSentOversizedRecord).into());
        }
        incoming.fill(HEADER + len, receive)?;
        match incoming.open(len)? {
            ContentType::ApplicationData => Ok(()),
            ContentType::Handshake => self.handshake(incoming).map_err(WireError::from),
            ContentType::Alert => Err(incoming.alert()),
            _ => Err(TlsError::Unexpected("a record of an unknown type").into()),
        }
    }

    fn handshake(&self, incoming: &mut Incoming) -> Result<(), TlsError> {
        let message = incoming.plain.clone();
        if incoming.buffer[message] != KEY_UPDATE {
            return Err(TlsError::Unexpected("a handshake"));
        }
        incoming.plain = 0..0;
        let (sequence, secrets) = self.keys.lock().next_in()?;
        incoming.opener = opener(self.suite, secrets)?;
        incoming.sequence = sequence;
        Ok(())
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").field("suite", &self.suite.common.suite).finish_non_exhaustive()
    }
}

impl Outgoing {
    fn seal(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<Vec<u8>, TlsError> {
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let sealed = self.sealer.encrypt(message, self.sequence)?;
        self.sequence += 1;
        Ok(sealed.encode())
    }
}

impl Incoming {
    /// Returns up to `max` opened bytes and marks them as read.
    fn take(&mut self, max: usize) -> &[u8] {
        let start = self.plain.start;
        self.plain.start += self.plain.len().min(max);
        &self.buffer[start..self.plain.start]
    }

    /// Reads until at least `count` sealed bytes are buffered. All opened bytes must have been read.
    fn fill(
        &mut self,
        count: usize,
        receive: &mut impl FnMut(&mut [u8]) -> Result<usize, WireError>,
    ) -> Result<(), WireError> {
        if self.sealed.len() < count && self.sealed.start + MAX_SEALED + HEADER > self.buffer.len() {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        while self.sealed.len() < count {
            if self.sealed.is_empty() {
                self.sealed = 0..0;
            }
            self.sealed.end += receive(&mut self.buffer[self.sealed.end..])?;
        }
        Ok(())
    }

    /// Opens the next record, with `len` sealed bytes, in place. Returns its type.
    fn open(&mut self, len: usize) -> Result<ContentType, TlsError> {
        let start = self.sealed.start + HEADER;
        let sealed = &mut self.buffer[start..start + len];
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, sealed);
        let opened = self.opener.decrypt(message, self.sequence)?;
        // The plaintext starts where the sealed part started, and is shorter.
        let (typ, plain) = (opened.typ, opened.payload.len());
        self.sequence += 1;
        self.plain = start..start + plain;
        self.sealed.start = start + len;
        Ok(typ)
    }

    fn alert(&mut self) -> WireError {
        match self.take(2) {
            [_, code] if *code == u8::from(AlertDescription::CloseNotify) => WireError::Closed,
            [_, code] => TlsError::Ended(format!("{:?}", AlertDescription::from(*code))).into(),
            _ => TlsError::Unexpected("a truncated alert").into(),
        }
    }
}

fn sealer(suite: &Tls13CipherSuite, secrets: ConnectionTrafficSecrets) -> Result<Box<dyn MessageEncrypter>, TlsError> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok(suite.aead_alg.encrypter(key, iv)),
        _ => Err(TlsError::Unexpected("an unknown cipher")),
    }
}

fn opener(suite: &Tls13CipherSuite, secrets: ConnectionTrafficSecrets) -> Result<Box<dyn MessageDecrypter>, TlsError> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok(suite.aead_alg.decrypter(key, iv)),
        _ => Err(TlsError::Unexpected("an unknown cipher")),
    }
}
