//! Tests of handshakes and records, between two sides in memory.

use std::cell::RefCell;
use std::collections::VecDeque;

use proptest::prelude::*;
use rcgen::{CertifiedKey, generate_simple_self_signed};

use super::records::Records;
use super::{Identity, Session, TlsError};
use crate::wire::WireError;

struct Host {
    identity: Identity,
    certificate: Vec<u8>,
}

fn host() -> Host {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["host.example".into()]).unwrap();
    let identity = Identity::new(cert.pem().as_bytes(), signing_key.serialize_pem().as_bytes()).unwrap();
    Host { identity, certificate: cert.der().to_vec() }
}

/// Transfers messages in both directions until neither side has bytes to send. Returns the first error.
fn shake(source: &mut Session, receiver: &mut Session) -> Result<(), TlsError> {
    loop {
        let (there, back) = (source.outgoing(), receiver.outgoing());
        if there.is_empty() && back.is_empty() {
            return Ok(());
        }
        // Transfer small chunks, as a network may deliver them.
        there.chunks(97).try_for_each(|piece| receiver.feed(piece))?;
        back.chunks(89).try_for_each(|piece| source.feed(piece))?;
    }
}

fn sessions() -> (Session, Session) {
    let (a, b) = (host(), host());
    let mut source = a.identity.connect(b.certificate.clone()).unwrap();
    let mut receiver = b.identity.accept(vec![a.certificate.clone()]).unwrap();
    shake(&mut source, &mut receiver).unwrap();
    assert!(source.established() && receiver.established());
    assert_eq!(receiver.peer_certificate(), Some(a.certificate.as_slice()));
    assert_eq!(source.peer_certificate(), Some(b.certificate.as_slice()));
    (source, receiver)
}

fn records() -> (Records, Records) {
    let (source, receiver) = sessions();
    (source.into_records().unwrap(), receiver.into_records().unwrap())
}

/// Bytes in transit.
#[derive(Default)]
struct Wire(RefCell<VecDeque<u8>>);

impl Wire {
    fn send(&self, batch: &[Vec<u8>]) -> Result<(), WireError> {
        self.0.borrow_mut().extend(batch.iter().flatten());
        Ok(())
    }

    /// Moves up to `max` bytes from the wire to `bytes`. Returns their number.
    fn receive(&self, bytes: &mut [u8], max: usize) -> Result<usize, WireError> {
        let mut waiting = self.0.borrow_mut();
        let count = waiting.len().min(bytes.len()).min(max);
        if count == 0 {
            return Err(WireError::Closed);
        }
        bytes.iter_mut().zip(waiting.drain(..count)).for_each(|(to, from)| *to = from);
        Ok(count)
    }
}

fn write(records: &Records, wire: &Wire, parts: &[&[u8]]) {
    records.write(parts, |batch| wire.send(batch)).unwrap();
}

fn read(records: &Records, wire: &Wire, count: usize, max: usize) -> Result<Vec<u8>, WireError> {
    let mut bytes = vec![0; count];
    let (first, second) = bytes.split_at_mut(count / 3);
    let buffers = [first, second].map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
    // SAFETY: the buffers are two parts of a vector that lives through the call.
    unsafe { records.read(&buffers, |bytes| wire.receive(bytes, max)) }?;
    Ok(bytes)
}

fn noise(count: usize, seed: u8) -> Vec<u8> {
    (0..count).map(|at| (at as u64).wrapping_mul(0x9e37_79b9).to_le_bytes()[2] ^ seed).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn written_bytes_are_read(
        parts in prop::collection::vec(0_usize..70_000, 1..6),
        reads in prop::collection::vec(1_usize..90_000, 1..6),
        max in 1_usize..40_000,
    ) {
        let (source, receiver) = records();
        let wire = Wire::default();
        let part = |(seed, &count): (usize, &usize)| noise(count, u8::try_from(seed).unwrap());
        let data: Vec<_> = parts.iter().enumerate().map(part).collect();
        for part in &data {
            let (head, payload) = part.split_at(part.len() / 4);
            write(&source, &wire, &[head, payload]);
        }
        let all: Vec<u8> = data.concat();
        let mut rest = all.as_slice();
        for count in reads.into_iter().cycle() {
            let count = count.min(rest.len());
            if count == 0 {
                break;
            }
            prop_assert_eq!(&read(&receiver, &wire, count, max).unwrap(), &rest[..count]);
            rest = &rest[count..];
        }
    }
}

#[test]
fn bytes_written_during_the_handshake_start_the_stream() {
    let (a, b) = (host(), host());
    let mut source = a.identity.connect(b.certificate.clone()).unwrap();
    let mut receiver = b.identity.accept(vec![a.certificate.clone()]).unwrap();
    receiver.feed(&source.outgoing()).unwrap();
    source.feed(&receiver.outgoing()).unwrap();
    source.write(b"greeting").unwrap();
    source.write(b"and more").unwrap();
    let last = source.outgoing();
    let (whole, half) = last.split_at(last.len() - 3);
    receiver.feed(whole).unwrap();
    assert_eq!(receiver.read(9), None);
    assert_eq!(receiver.read(8).unwrap(), b"greeting");
    let (source, receiver) = (source.into_records().unwrap(), receiver.into_records().unwrap());
    let wire = Wire::default();
    wire.send(&[half.to_vec()]).unwrap();
    write(&source, &wire, &[b", then records"]);
    assert_eq!(read(&receiver, &wire, 22, 7).unwrap(), b"and more, then records");
}

#[test]
fn only_accepted_certificates_are_authenticated() {
    let (a, b, stranger) = (host(), host(), host());
    let mut source = stranger.identity.connect(b.certificate.clone()).unwrap();
    let mut receiver = b.identity.accept(vec![a.certificate.clone()]).unwrap();
    let refused = shake(&mut source, &mut receiver).unwrap_err();
    assert!(matches!(refused, TlsError::UnexpectedPeer), "{refused}");
    // The peer receives the alert in a record that it can open.
    let told = source.feed(&receiver.outgoing()).unwrap_err();
    assert!(matches!(told, TlsError::Ended(_)), "{told}");

    let mut source = a.identity.connect(b.certificate.clone()).unwrap();
    let mut receiver = stranger.identity.accept(vec![a.certificate.clone()]).unwrap();
    let refused = shake(&mut source, &mut receiver).unwrap_err();
    assert!(matches!(refused, TlsError::UnexpectedPeer), "{refused}");
    assert!(!source.established() && !receiver.established());
}

#[test]
fn certificate_without_its_key_is_rejected() {
    let (a, b) = (host(), host());
    let CertifiedKey { cert, .. } = generate_simple_self_signed(["host.example".into()]).unwrap();
    let CertifiedKey { signing_key, .. } = generate_simple_self_signed(["host.example".into()]).unwrap();
    let mixed = Identity::new(cert.pem().as_bytes(), signing_key.serialize_pem().as_bytes());
    assert!(matches!(mixed, Err(TlsError::Identity(_))));
    for (certificate, key) in [("", ""), ("-----BEGIN CERTIFICATE-----\n", "x"), (cert.pem().as_str(), "")] {
        assert!(matches!(Identity::new(certificate.as_bytes(), key.as_bytes()), Err(TlsError::Identity(_))));
    }
    assert!(a.identity.connect(b.certificate).unwrap().write(b"too early").is_err());
}

#[test]
fn modified_records_are_rejected() {
    for at in [0, 1, 5, 6, 1000, 16 * 1024, 16 * 1024 + 10] {
        let (source, receiver) = records();
        let wire = Wire::default();
        write(&source, &wire, &[&noise(20_000, 1)]);
        wire.0.borrow_mut()[at] ^= 0x40;
        // TLS 1.3 ignores the outer version.
        assert_eq!(read(&receiver, &wire, 20_000, 1 << 16).is_err(), at != 1, "byte {at}");
    }
}

#[test]
fn missing_records_are_rejected() {
    let (source, receiver) = records();
    let sealed = RefCell::new(Vec::new());
    let keep = |batch: &[Vec<u8>]| {
        sealed.borrow_mut().extend_from_slice(batch);
        Ok(())
    };
    source.write(&[&noise(3 * 16 * 1024, 3)], keep).unwrap();
    let wire = Wire::default();
    wire.send(&sealed.borrow()[1..]).unwrap();
    assert!(matches!(read(&receiver, &wire, 10, 1 << 16), Err(WireError::Tls(_))));
}

#[test]
fn unauthenticated_peer_cannot_fill_memory() {
    let b = host();
    let mut receiver = b.identity.accept(vec![b.certificate.clone()]).unwrap();
    let mut taken = 0_usize;
    // Handshake record that announces a message of 16 MiB, which is never completed.
    let mut record = vec![22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    record.resize(5 + 0x4000, 0);
    while receiver.feed(&record).is_ok() {
        taken += record.len();
        assert!(taken < 1 << 20);
    }
}

#[test]
fn keys_change_before_the_record_limit() {
    let (mut source, mut receiver) = records();
    source.records_per_key(3);
    receiver.records_per_key(2);
    let (there, back) = (Wire::default(), Wire::default());
    for round in 0..20 {
        let data = noise(50_000, round);
        write(&source, &there, &[&data]);
        assert_eq!(read(&receiver, &there, data.len(), 5000).unwrap(), data);
        write(&receiver, &back, &[&data[..100]]);
        assert_eq!(read(&source, &back, 100, 5000).unwrap(), &data[..100]);
    }
}
