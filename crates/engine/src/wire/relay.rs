//! Relay of a byte stream between a local socket and a connection to the peer.
//!
//! Relays carry the NBD connections between two QEMUs, which use Unix sockets of their hosts. A relay does not
//! interpret the bytes. It needs no timeouts, because the control connection detects a lost peer, and the caller then
//! closes the relay.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::pace::RateLimit;
use super::socket::{Endpoint, Socket};
use super::{WireError, tune};

/// Maximum number of bytes that are forwarded at a time. The number is small, because the pages of memory share the
/// bandwidth limit.
const CHUNK: usize = 128 << 10;

/// Running relay, with one thread per direction.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<RelayState>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct RelayState {
    local: Socket,
    remote: Socket,
    limit: Option<Arc<RateLimit>>,
    cancelled: Arc<AtomicBool>,
    sent: AtomicU64,
    received: AtomicU64,
    /// Number of directions in which bytes are still forwarded.
    open: AtomicUsize,
    failure: OnceLock<String>,
}

impl Relay {
    /// Starts to forward bytes between `local` and the connection `remote`. Bytes to `remote` count towards `limit`.
    ///
    /// # Errors
    /// The error of the socket operation or of the thread creation that failed.
    pub(super) fn with_limit(
        local: impl Into<Endpoint>,
        remote: impl Into<Endpoint>,
        limit: Option<Arc<RateLimit>>,
    ) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let remote = remote.into();
        tune(&remote.fd, libc::TCP_NODELAY, 1);
        let shared = Arc::new(RelayState {
            local: Socket::new(local.into(), Duration::MAX, cancelled.clone())?,
            remote: Socket::new(remote, Duration::MAX, cancelled.clone())?,
            limit,
            cancelled,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            open: AtomicUsize::new(2),
            failure: OnceLock::new(),
        });
        let relay = Self { shared, threads: Mutex::default() };
        relay.spawn("pf-disk-out", RelayState::send)?;
        relay.spawn("pf-disk-in", RelayState::receive)?;
        Ok(relay)
    }

    /// Like [`Relay::with_limit`], without a bandwidth limit.
    ///
    /// # Errors
    /// As for [`Relay::with_limit`].
    pub fn new(local: impl Into<Endpoint>, remote: impl Into<Endpoint>) -> io::Result<Self> {
        Self::with_limit(local, remote, None)
    }

    /// Returns the number of bytes sent to the peer.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes received from the peer.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Returns whether both directions have ended.
    pub fn has_ended(&self) -> bool {
        self.shared.open.load(Ordering::Acquire) == 0
    }

    /// Returns the reason why the relay has failed; `None` if it has not failed, or if it was closed.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.get().cloned()
    }

    /// Closes both sockets, and waits for the threads.
    pub fn close(&self) {
        self.shared.stop();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            let _ = thread.join();
        }
    }

    fn spawn(&self, name: &str, work: fn(&RelayState) -> Result<(), WireError>) -> io::Result<()> {
        let shared = self.shared.clone();
        let run = move || shared.run(work);
        self.threads.lock().push(std::thread::Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.close();
    }
}

impl RelayState {
    fn run(&self, work: fn(&Self) -> Result<(), WireError>) {
        if let Err(error) = work(self) {
            if !matches!(error, WireError::Cancelled) {
                let _ = self.failure.set(error.to_string());
            }
            self.stop();
        }
        self.open.fetch_sub(1, Ordering::AcqRel);
    }

    fn stop(&self) {
        self.cancelled.store(true, Ordering::Release);
        // The QEMU on this host notices at once that the connection has ended, and fails its requests.
        self.local.shut_down(libc::SHUT_RDWR);
        self.remote.shut_down(libc::SHUT_RDWR);
    }

    fn send(&self) -> Result<(), WireError> {
        forward(&self.local, &self.remote, &self.sent, |bytes| match &self.limit {
            Some(limit) => limit.wait(bytes, false, &self.cancelled),
            None => Ok(()),
        })
    }

    fn receive(&self) -> Result<(), WireError> {
        forward(&self.remote, &self.local, &self.received, |_| Ok(()))
    }
}

/// Forwards bytes until `from` ends, then ends the writing side of `to`. Calls `wait` before every write.
fn forward(
    from: &Socket,
    to: &Socket,
    count: &AtomicU64,
    wait: impl Fn(usize) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let bytes = match from.read_available(&mut buffer) {
            Ok(bytes) => bytes,
            Err(WireError::Closed) => {
                to.shut_down(libc::SHUT_WR);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        wait(bytes)?;
        to.write([&buffer[..bytes], &[]])?;
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;

    /// Returns a client and a server that are connected by two relays, one per host.
    fn connected(limit: Option<Arc<RateLimit>>) -> (UnixStream, UnixStream, [Relay; 2]) {
        let (client, here) = UnixStream::pair().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let (there, server) = UnixStream::pair().unwrap();
        let source = Relay::with_limit(OwnedFd::from(here), OwnedFd::from(near), limit).unwrap();
        let destination = Relay::new(OwnedFd::from(there), OwnedFd::from(far)).unwrap();
        (client, server, [source, destination])
    }

    fn wait_for_end(relay: &Relay) {
        let start = Instant::now();
        while !relay.has_ended() {
            assert!(start.elapsed() < Duration::from_secs(20), "the relay has not ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn bytes_and_their_end_are_forwarded_in_both_directions() {
        let (mut client, mut server, relays) = connected(None);
        let sent: Vec<u8> = (0..1 << 20).map(|number: u32| number.to_le_bytes()[1]).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                client.write_all(&sent).unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            assert!(received == sent);
        });
        server.write_all(b"reply").unwrap();
        drop(server);
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).unwrap();
        assert_eq!(reply, b"reply");
        relays.iter().for_each(wait_for_end);
        assert_eq!((relays[0].sent(), relays[0].received(), relays[0].failure()), (1 << 20, 5, None));
    }

    #[test]
    fn closing_ends_the_connections_of_both_hosts() {
        let (mut client, mut server, relays) = connected(None);
        relays[0].close();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        drop((client, server));
        relays.iter().for_each(wait_for_end);
    }

    #[test]
    fn bytes_count_towards_the_shared_limit() {
        let limit = Arc::new(RateLimit::new(1 << 20));
        let (mut client, mut server, _relays) = connected(Some(limit));
        let start = Instant::now();
        client.write_all(&[0; 512 << 10]).unwrap();
        let mut received = vec![0; 512 << 10];
        server.read_exact(&mut received).unwrap();
        // The last chunk may be sent when all others have been sent at the limited rate.
        assert!(start.elapsed() > Duration::from_millis(300), "{:?}", start.elapsed());
    }
}
