"""Certificate authorities and certificates for tests, in the folder layout of `--tls`."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

DAY = datetime.timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
PEM = serialization.Encoding.PEM


def new_key(kind: str = "P-256") -> Key:
    """Return a new private key. `kind`: `RSA` (2048 bits), `Ed25519`, `P-521`, or otherwise P-256."""
    match kind:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "Ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case "P-521":
            return ec.generate_private_key(ec.SECP521R1())
        case _:
            return ec.generate_private_key(ec.SECP256R1())


class Authority:
    """Certificate authority that issues and revokes certificates."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        builder = self._builder(self._name, self._key.public_key(), -DAY, DAY)
        builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
        self.certificate = builder.sign(self._key, hashes.SHA256())

    def folder(self, path: Path) -> Path:
        """Create the directory `path` with the certificate of this authority, and return `path`."""
        path.mkdir()
        (path / "ca-cert.pem").write_bytes(self.certificate.public_bytes(PEM))
        return path

    def issue(
        self,
        folder: Path,
        role: str,
        name: str,
        *,
        also: Sequence[str] = (),
        purpose: x509.ObjectIdentifier | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = (),
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
        key: str = "P-256",
    ) -> x509.Certificate:
        """Write a certificate and its key to `ROLE-cert.pem` and `ROLE-key.pem`.

        Return the certificate. `role`: `client` or `server`; `also`: subject alternative names (DNS names and IP
        addresses); `purposes`: all purposes of a certificate with several; `begins`, `ends`: validity, relative to now.
        """
        private = new_key(key)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, private.public_key(), begins, ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        purpose = purpose or (SERVER if role == "server" else CLIENT)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes or [purpose]), critical=False)
        if also:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(each) for each in also]), False)
        certificate = builder.sign(self._key, hashes.SHA256())
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(PEM))
        secret = folder / f"{role}-key.pem"
        secret.touch(0o600)
        secret.write_bytes(private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return certificate

    def revoke(self, folder: Path, *certificates: x509.Certificate, ends: datetime.timedelta = DAY) -> None:
        """Write the certificate revocation list `ca-crl.pem` with these certificates to `folder`.

        `ends`: end of validity of the list, relative to now.
        """
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - DAY).next_update(now + ends)
        for certificate in certificates:
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(now - DAY).build())
        (folder / "ca-crl.pem").write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(PEM))

    def _builder(
        self,
        subject: x509.Name,
        public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey,
        begins: datetime.timedelta,
        ends: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now + begins).not_valid_after(now + ends)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def hosts(path: Path, authority: Authority | None = None, *, source: str = "source.example") -> tuple[Path, Path]:
    """Create folders with certificates of a source and of a receiver that authenticate each other over loopback.

    Return the source's folder and the receiver's folder.
    """
    path.mkdir(exist_ok=True)
    authority = authority or Authority()
    here, there = authority.folder(path / "source"), authority.folder(path / "receiver")
    authority.issue(here, "client", source)
    authority.issue(there, "server", "receiver.example", also=("127.0.0.1", "receiver.example"))
    return here, there
