//! TLS handshake without I/O, and the first bytes of the stream after the handshake.

use std::fmt;
use std::sync::Arc;

use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, Error, ServerConfig};

use super::TlsError;
use super::records::{Keys, Records};

/// Maximum number of buffered bytes of an unauthenticated peer: 64 KiB of certificates and all other messages.
const MAX_INCOMING: usize = 128 << 10;
/// Server name, required by rustls. It is neither resolved nor compared with a certificate.
const NAME: &str = "peer.invalid";

/// One side of a TLS connection, from the first byte until a stream takes it over.
///
/// The caller passes received bytes to [`feed`](Self::feed) and sends the bytes that [`outgoing`](Self::outgoing)
/// returns. After an error, the caller must send these bytes as well, because they contain the alert.
pub struct Session {
    end: End,
    /// Received bytes that have not been processed.
    incoming: Vec<u8>,
    /// Bytes to send.
    outgoing: Vec<u8>,
    /// Opened bytes that have not been read.
    plain: Vec<u8>,
    established: bool,
    failed: bool,
}

enum End {
    Connecting(UnbufferedClientConnection),
    Accepting(UnbufferedServerConnection),
}

impl Session {
    pub(super) fn connect(mut config: ClientConfig) -> Result<Self, TlsError> {
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        let name = ServerName::try_from(NAME).map_err(|error| Error::General(error.to_string()))?;
        let mut session = Self::new(End::Connecting(UnbufferedClientConnection::new(Arc::new(config), name)?));
        session.feed(&[])?;
        Ok(session)
    }

    pub(super) fn accept(mut config: ServerConfig) -> Result<Self, TlsError> {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(Self::new(End::Accepting(UnbufferedServerConnection::new(Arc::new(config))?)))
    }

    fn new(end: End) -> Self {
        Self { end, incoming: Vec::new(), outgoing: Vec::new(), plain: Vec::new(), established: false, failed: false }
    }

    /// Processes bytes received from the peer.
    ///
    /// # Errors
    /// If the handshake fails, if the peer sends more bytes than a handshake needs, or on any call after an error.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        if self.failed {
            return Err(TlsError::Unexpected("data after an error"));
        }
        if self.incoming.len() + self.plain.len() + bytes.len() > MAX_INCOMING {
            self.failed = true;
            return Err(TlsError::TooMuch);
        }
        self.incoming.extend_from_slice(bytes);
        let advanced = self.advance();
        if advanced.is_err() {
            // Advance once more, so that rustls produces an alert for the peer. The call returns the same error again.
            self.failed = true;
            let _ = self.advance();
        }
        advanced
    }

    /// Returns the bytes to send to the peer, and removes them from the session.
    pub fn outgoing(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.outgoing)
    }

    /// Returns whether the handshake is complete. On the connecting side, the peer may still reject the certificate.
    pub fn established(&self) -> bool {
        self.established
    }

    /// Returns the certificate that the peer has presented (DER), or `None` if there is none yet.
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        let shown = match &self.end {
            End::Connecting(connection) => connection.peer_certificates(),
            End::Accepting(connection) => connection.peer_certificates(),
        };
        shown?.first().map(AsRef::as_ref)
    }

    /// Seals bytes for the peer, and appends them to the bytes to send.
    ///
    /// # Errors
    /// If the handshake is not complete.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        match &mut self.end {
            End::Connecting(connection) => seal(connection.process_tls_records(&mut []), bytes, &mut self.outgoing),
            End::Accepting(connection) => seal(connection.process_tls_records(&mut []), bytes, &mut self.outgoing),
        }
    }

    /// Removes and returns `count` opened bytes; `None` if fewer have been received.
    pub fn read(&mut self, count: usize) -> Option<Vec<u8>> {
        (self.plain.len() >= count).then(|| self.plain.drain(..count).collect())
    }

    /// Converts the session into the record layer of a stream.
    ///
    /// # Errors
    /// If the handshake is not complete.
    pub(in crate::wire) fn into_records(self) -> Result<Records, TlsError> {
        let (secrets, keys) = match self.end {
            End::Connecting(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                (secrets, Keys::Connecting(keys))
            }
            End::Accepting(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                (secrets, Keys::Accepting(keys))
            }
        };
        Records::new(secrets, keys, &self.plain, &self.incoming)
    }

    fn advance(&mut self) -> Result<(), TlsError> {
        loop {
            let (discard, step) = match &mut self.end {
                End::Connecting(connection) => {
                    take_step(connection.process_tls_records(&mut self.incoming), &mut self.outgoing, &mut self.plain)
                }
                End::Accepting(connection) => {
                    take_step(connection.process_tls_records(&mut self.incoming), &mut self.outgoing, &mut self.plain)
                }
            };
            self.incoming.drain(..discard);
            match step? {
                Step::Again => {}
                Step::Blocked => return Ok(()),
                Step::Established => {
                    self.established = true;
                    return Ok(());
                }
            }
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("established", &self.established).finish_non_exhaustive()
    }
}

enum Step {
    Again,
    Blocked,
    Established,
}

/// Performs the next step of a handshake. Returns the number of consumed input bytes, and the result of the step.
fn take_step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> (usize, Result<Step, TlsError>) {
    let discard = status.discard;
    let step = status.state.map_err(TlsError::from).and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut data) => {
            into(outgoing, |room| match data.encode(room) {
                Err(EncodeError::InsufficientSize(size)) => Err(Some(size.required_size)),
                Err(EncodeError::AlreadyEncoded) => Err(None),
                Ok(written) => Ok(written),
            })?;
            Ok(Step::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done(); // the bytes are in `outgoing`
            Ok(Step::Again)
        }
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                plain.extend_from_slice(record?.payload);
            }
            Ok(Step::Again)
        }
        ConnectionState::WriteTraffic(_) => Ok(Step::Established),
        ConnectionState::BlockedHandshake => Ok(Step::Blocked),
        ConnectionState::PeerClosed | ConnectionState::Closed => Err(TlsError::Ended("closed".into())),
        _ => Err(TlsError::Unexpected("early data")),
    });
    (discard, step)
}

fn seal<Data>(status: UnbufferedStatus<'_, '_, Data>, bytes: &[u8], outgoing: &mut Vec<u8>) -> Result<(), TlsError> {
    let ConnectionState::WriteTraffic(mut writer) = status.state? else {
        return Err(Error::HandshakeNotComplete.into());
    };
    into(outgoing, |room| match writer.encrypt(bytes, room) {
        Err(EncryptError::InsufficientSize(size)) => Err(Some(size.required_size)),
        Err(EncryptError::EncryptExhausted) => Err(None),
        Ok(written) => Ok(written),
    })
}

/// Appends the output of `write`, after a first call that returns the required size.
fn into(
    outgoing: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> Result<(), TlsError> {
    let start = outgoing.len();
    let exhausted = || TlsError::from(Error::EncryptError);
    let written = match write(&mut []) {
        Err(Some(required)) => {
            outgoing.resize(start + required, 0);
            write(&mut outgoing[start..]).map_err(|_| exhausted())?
        }
        Err(None) => return Err(exhausted()),
        Ok(written) => written,
    };
    outgoing.truncate(start + written);
    Ok(())
}
