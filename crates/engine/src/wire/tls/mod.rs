//! TLS 1.3 on page streams: who the two ends are, the handshake, and the records.
//!
//! Whom to believe is decided on the control connection, where authorities, names, dates and revocations are checked.
//! A page stream believes exactly the certificates that were accepted there, so it can only be between the same two
//! hosts. The handshake ([`Session`]) does no input or output of its own; who has a stream that is complete hands both,
//! descriptor and session, to a sender or receiver, which from then on opens and seals records in its own buffers.

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

/// Why a handshake or a record was refused.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A certificate or key that cannot be used.
    #[error("{0}")]
    Identity(String),
    /// What the library says: of the peer's certificate, its signature, its records.
    #[error("{0}")]
    Refused(Error),
    /// It is somebody else than on the control connection.
    #[error("the certificate is not the one that was shown on the control connection")]
    Stranger,
    /// The peer ended it, with a reason.
    #[error("the peer ended the secure connection: {0}")]
    Ended(String),
    /// What TLS allows, and no pageferry sends.
    #[error("{0} on a page stream")]
    Unexpected(&'static str),
    /// More than a handshake can need.
    #[error("the peer sent too much before it had shown who it is")]
    TooMuch,
}

impl From<Error> for TlsError {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => Self::Stranger,
            Error::AlertReceived(alert) => Self::Ended(format!("{alert:?}")),
            error => Self::Refused(error),
        }
    }
}

/// Our own certificate and its key.
#[derive(Debug)]
pub struct Identity {
    key: Arc<SingleCertAndKey>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// From the certificate (with those that lead to the authority, if any) and its private key, both PEM.
    ///
    /// # Errors
    /// [`TlsError::Identity`] for what is no certificate or key, or of a kind that page streams cannot use; the message
    /// says which of the two.
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

    /// The connecting end of a handshake, with the one that has this certificate.
    pub fn connect(&self, expected: Vec<u8>) -> Result<Session, TlsError> {
        let config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous() // is the library's word for a verifier of one's own
            .with_custom_certificate_verifier(Arc::new(self.known(vec![expected])))
            .with_client_cert_resolver(self.key.clone());
        Session::connect(config)
    }

    /// The accepting end of a handshake, with anyone who has one of these certificates.
    pub fn accept(&self, accepted: Vec<Vec<u8>>) -> Result<Session, TlsError> {
        let config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(self.known(accepted)))
            .with_cert_resolver(self.key.clone());
        Session::accept(config)
    }

    fn known(&self, certificates: Vec<Vec<u8>>) -> Known {
        let certificates = certificates.into_iter().map(CertificateDer::from).collect();
        Known { certificates, algorithms: self.provider.signature_verification_algorithms }
    }
}

/// The quickest cipher first: both ends have it, and where the hardware has none of AES they agree on the last one.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

/// Believes certificates that were accepted before, and nobody else; that the peer has the key is checked as always.
#[derive(Debug)]
struct Known {
    certificates: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Known {
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

/// What is never asked for: nothing older than TLS 1.3 is spoken.
fn no_older_version() -> Error {
    Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic)
}

impl ServerCertVerifier for Known {
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
        Err(no_older_version())
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

impl ClientCertVerifier for Known {
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
        Err(no_older_version())
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
