//! TLS 1.3 on page streams: identities, handshake and records.
//!
//! Peers are authenticated on the control connection, which checks authorities, names, dates and revocations. A page
//! stream accepts exactly the certificates that the control connection has accepted, so both connections are between
//! the same hosts. The handshake ([`Session`]) performs no I/O. When the handshake is complete, the caller passes the
//! descriptor and the session to a sender or receiver, which seals and opens records in its own buffers from then on.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::{self, cipher_suite};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use thiserror::Error;

mod records;
mod session;
#[cfg(test)]
mod tests;

pub(super) use records::Records;
pub use session::Session;

/// Reason why a handshake or a record was rejected.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The certificate or key cannot be used.
    #[error("{0}")]
    Identity(String),
    /// rustls rejected the peer's certificate, signature or records.
    #[error("{0}")]
    Refused(Error),
    /// The peer's certificate is not among those accepted on the control connection.
    #[error("certificate differs from the one presented on the control connection")]
    UnexpectedPeer,
    /// The peer ended the connection with an alert.
    #[error("the peer ended the TLS connection: {0}")]
    Ended(String),
    /// The message is valid in TLS but is not part of the protocol of page streams.
    #[error("unexpected message on a page stream: {0}")]
    Unexpected(&'static str),
    /// The peer sent more bytes than a handshake needs.
    #[error("the peer sent more bytes than a handshake needs before it was authenticated")]
    TooMuch,
}

impl From<Error> for TlsError {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => Self::UnexpectedPeer,
            Error::AlertReceived(alert) => Self::Ended(format!("{alert:?}")),
            error => Self::Refused(error),
        }
    }
}

/// Certificate and private key of this host.
#[derive(Debug)]
pub struct Identity {
    key: Arc<SingleCertAndKey>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// Creates an identity from a PEM certificate, including intermediate certificates if any, and its PEM private key.
    ///
    /// # Errors
    /// [`TlsError::Identity`] if the certificate or the key is invalid or of an unsupported kind; the message names the
    /// invalid one.
    pub fn new(certificates: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let identity = |what: &str, error: &dyn std::fmt::Display| TlsError::Identity(format!("{what}: {error}"));
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificates)
            .collect::<Result<_, _>>()
            .map_err(|error| identity("certificate", &error))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| identity("private key", &error))?;
        let provider = Arc::new(provider());
        let certified =
            CertifiedKey::from_der(chain, key, &provider).map_err(|error| identity("certificate and key", &error))?;
        Ok(Self { key: Arc::new(certified.into()), provider })
    }

    /// Creates the connecting side of a handshake with the host that has the certificate `expected` (DER).
    ///
    /// # Errors
    /// The error of rustls if the configuration is invalid.
    pub fn connect(&self, expected: Vec<u8>) -> Result<Session, TlsError> {
        let config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous() // rustls requires this call for a custom verifier
            .with_custom_certificate_verifier(Arc::new(self.verifier(vec![expected])))
            .with_client_cert_resolver(self.key.clone());
        Session::connect(config)
    }

    /// Creates the accepting side of a handshake with any host that has one of the certificates `accepted` (DER).
    ///
    /// # Errors
    /// The error of rustls if the configuration is invalid.
    pub fn accept(&self, accepted: Vec<Vec<u8>>) -> Result<Session, TlsError> {
        let config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(self.verifier(accepted)))
            .with_cert_resolver(self.key.clone());
        Session::accept(config)
    }

    fn verifier(&self, certificates: Vec<Vec<u8>>) -> AcceptedCertificates {
        let certificates = certificates.into_iter().map(CertificateDer::from).collect();
        AcceptedCertificates { certificates, algorithms: self.provider.signature_verification_algorithms }
    }
}

/// Returns the cryptography provider, with the fastest cipher suite first. Peers without AES in hardware negotiate the
/// last suite, ChaCha20-Poly1305.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

/// Verifier that accepts a fixed set of certificates. The peer must still prove that it has the private key.
#[derive(Debug)]
struct AcceptedCertificates {
    certificates: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl AcceptedCertificates {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if self.certificates.iter().any(|known| known == certificate) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

/// Returns the error of the TLS 1.2 callbacks. The callbacks are never called, because only TLS 1.3 is enabled.
fn unsupported_version() -> Error {
    Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic)
}

impl ServerCertVerifier for AcceptedCertificates {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(unsupported_version())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for AcceptedCertificates {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(unsupported_version())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
