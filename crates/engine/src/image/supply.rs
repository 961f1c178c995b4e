//! Supply of storage blocks that an image file does not contain yet (S10).
//!
//! A file in the cache of images has its full length, but storage blocks are holes until they are fetched from a store.
//! A *provider* fetches them: a Python thread or process at the other end of a socket, which verifies each block and
//! writes it to the file, header last. A thread that needs a block sends its number, and waits until the provider
//! reports the block. No thread of the engine takes the GIL for this.
//!
//! No record states which blocks exist: a block whose header or whose page blocks do not match their checksums is
//! missing, and is fetched. The file is therefore valid after a crash at any time, and damage is repaired.
//!
//! ```text
//! engine ─▶ provider    12 bytes: kind (1 demand, 2 background, 3 prefetch, 4 end of the order), image, block
//! provider ─▶ engine    16 bytes: kind (1 present, 2 failed), image in the chain, block, length of a message; message
//! ```

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::format::ImageError;
use super::reader::{Chain, Image};

/// Index of an image in the chain, and of a storage block in the image.
pub type Number = (usize, u32);

/// Interval at which a waiting thread checks whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time for which a failure is returned before the block is requested again.
const FAILURE_TIME: Duration = Duration::from_secs(2);
/// Maximum number of requests per system call.
const BATCH: usize = 4096;
/// Maximum length of the message of a failure in bytes.
const MAX_MESSAGE: usize = 64 << 10;

const DEMAND: u32 = 1;
const BACKGROUND: u32 = 2;
const PREFETCH: u32 = 3;
const END_OF_ORDER: u32 = 4;
const PRESENT: u32 = 1;
const FAILED: u32 = 2;

/// States of a block.
///
/// The header has not been found in the file. It is read again each time: another process may have written the block.
const UNKNOWN: u8 = 0;
/// The block in the file is damaged, and has to be fetched again.
const DAMAGED: u8 = 1;
/// The header in the file matches the block table.
const FOUND: u8 = 2;
/// The provider has verified and written the block, or this process has verified its page blocks.
const VERIFIED: u8 = 3;

thread_local! {
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one whose requests yield to those of other threads.
pub fn request_in_background() {
    IN_BACKGROUND.set(true);
}

/// Function that is called once when a block is present or cannot be fetched.
type Notify = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Requests {
    /// Requested blocks: whether a thread has demanded the block, or only a background thread has requested it.
    pending: HashMap<Number, bool>,
    failed: HashMap<Number, (Instant, String)>,
    parked: HashMap<Number, Vec<Notify>>,
    /// Reason why blocks are no longer fetched.
    closed: Option<String>,
}

impl Requests {
    /// Returns the error of a block that has just failed, or of all blocks if the provider has ended.
    fn failure(&self, number: Number) -> Option<ImageError> {
        let recent = |(at, message): &(Instant, String)| (at.elapsed() < FAILURE_TIME).then(|| message.clone());
        let message = self.failed.get(&number).and_then(recent).or_else(|| self.closed.clone())?;
        Some(ImageError::Unavailable { number: number.1, message })
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Requests").field("pending", &self.pending).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    blocks: Vec<Vec<AtomicU8>>,
    requests: Mutex<Requests>,
    changed: Condvar,
    socket: UnixStream,
    /// Lock of the sending direction of the socket.
    sending: Mutex<()>,
}

/// Supply of the storage blocks of a chain. When it is dropped, the provider reads the end of the stream, and exits.
#[derive(Debug)]
pub struct Supply(Arc<State>);

impl Supply {
    /// Supplies image `first` of a chain and its ancestors from the provider at the other end of a socket. The images
    /// refer to the supply from now on.
    ///
    /// # Errors
    /// If an image has a supply, or if no thread can be started.
    pub fn attach(chain: &Chain, first: usize, socket: OwnedFd) -> io::Result<Arc<Self>> {
        let socket = UnixStream::from(socket);
        let receiving = socket.try_clone()?;
        let states = |image: &Arc<Image>| image.blocks().iter().map(|_| AtomicU8::new(UNKNOWN)).collect();
        let state = Arc::new(State {
            blocks: chain.images().iter().map(states).collect(),
            requests: Mutex::default(),
            changed: Condvar::new(),
            socket,
            sending: Mutex::default(),
        });
        let supply = Arc::new(Self(state.clone()));
        for (number, image) in chain.images().iter().enumerate().skip(first) {
            if !image.set_supply(supply.clone(), number) {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the image has a provider of its blocks"));
            }
        }
        std::thread::Builder::new().name("pf-supply".into()).spawn(move || state.receive(receiving))?;
        Ok(supply)
    }

    /// Returns whether a block is in the file. It may still be found damaged when it is read.
    pub fn has(&self, image: &Image, number: Number) -> bool {
        let state = self.0.state(number);
        if state.load(Ordering::Acquire) == UNKNOWN && image.has_header_of(number.1) {
            let _ = state.compare_exchange(UNKNOWN, FOUND, Ordering::AcqRel, Ordering::Relaxed);
        }
        state.load(Ordering::Acquire) >= FOUND
    }

    /// Returns whether the page blocks of a block have been verified, so that a reader can omit it.
    pub fn is_verified(&self, number: Number) -> bool {
        self.0.state(number).load(Ordering::Acquire) == VERIFIED
    }

    /// Records that a reader has verified a block.
    pub fn verified(&self, number: Number) {
        let _ = self.0.state(number).compare_exchange(FOUND, VERIFIED, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Records that a block in the file is damaged, so that it is fetched again.
    pub fn distrust(&self, number: Number) {
        self.0.state(number).store(DAMAGED, Ordering::Release);
    }

    /// Waits until a block is in the file; requests it if no thread has.
    ///
    /// # Errors
    /// [`ImageError::Unavailable`] if the provider cannot fetch the block, [`ImageError::Interrupted`] if `stopped`
    /// returns true.
    pub fn wait(&self, image: &Image, number: Number, stopped: &dyn Fn() -> bool) -> Result<(), ImageError> {
        while !self.has(image, number) {
            self.request(&[number])?;
            let mut requests = self.0.requests.lock();
            while requests.pending.contains_key(&number) {
                if stopped() {
                    return Err(ImageError::Interrupted);
                }
                if requests.closed.is_some() {
                    break;
                }
                self.0.changed.wait_for(&mut requests, POLL_INTERVAL);
            }
            if let Some(error) = requests.failure(number)
                && self.0.state(number).load(Ordering::Acquire) < FOUND
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Requests blocks without waiting for them. Requests of a background thread yield to others.
    ///
    /// # Errors
    /// The failure of the only block, if it has just failed.
    pub fn request(&self, numbers: &[Number]) -> Result<(), ImageError> {
        let demand = !IN_BACKGROUND.get();
        let mut wanted = Vec::new();
        {
            let mut requests = self.0.requests.lock();
            for &number in numbers {
                // The block may have been reported since the caller has looked: there is no second report.
                if self.0.state(number).load(Ordering::Acquire) >= FOUND {
                    continue;
                }
                if let Some(error) = requests.failure(number) {
                    if numbers.len() == 1 {
                        return Err(error);
                    }
                    continue;
                }
                let known = requests.pending.get(&number).copied();
                if known.is_none_or(|demanded| demand && !demanded) {
                    requests.pending.insert(number, demand);
                    wanted.push(number);
                }
            }
        }
        self.0.send(if demand { DEMAND } else { BACKGROUND }, &wanted);
        Ok(())
    }

    /// Sends the order in which blocks are to be fetched that no thread has requested.
    pub fn prefetch(&self, order: &[Number]) {
        self.0.send(PREFETCH, order);
    }

    /// Reports that the orders that were sent contain all blocks that the pages of the chain need.
    pub fn end_order(&self) {
        self.0.send(END_OF_ORDER, &[(0, 0)]);
    }

    /// Requests a block that is missing, and calls `notify` when it is present or cannot be fetched. Returns false,
    /// without a call, if the block is present, or if a failure would be returned at once.
    pub fn park(&self, image: &Image, number: Number, notify: impl FnOnce() + Send + 'static) -> bool {
        if self.has(image, number) || self.request(&[number]).is_err() {
            return false;
        }
        let mut requests = self.0.requests.lock();
        if !requests.pending.contains_key(&number) || requests.closed.is_some() {
            return false;
        }
        requests.parked.entry(number).or_default().push(Box::new(notify));
        true
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }
}

impl State {
    fn state(&self, number: Number) -> &AtomicU8 {
        &self.blocks[number.0][number.1 as usize]
    }

    fn send(&self, kind: u32, numbers: &[Number]) {
        for part in numbers.chunks(BATCH) {
            let words = part.iter().flat_map(|&(image, block)| [kind, u32::try_from(image).unwrap_or(u32::MAX), block]);
            let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
            let _alone = self.sending.lock();
            // If the provider has ended, the receiving thread reports it.
            let _ = (&self.socket).write_all(&bytes);
        }
    }

    /// Receives the reports of the provider until it ends.
    fn receive(&self, mut socket: UnixStream) {
        loop {
            if let Err(error) = self.receive_one(&mut socket) {
                self.close(&error);
                return;
            }
        }
    }

    fn receive_one(&self, socket: &mut UnixStream) -> io::Result<()> {
        let mut head = [0; 16];
        socket.read_exact(&mut head)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let number = (word(4) as usize, word(8));
        let len = word(12) as usize;
        let exists = self.blocks.get(number.0).is_some_and(|blocks| (number.1 as usize) < blocks.len());
        if !exists || len > MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "invalid message of the provider"));
        }
        let mut message = vec![0; len];
        socket.read_exact(&mut message)?;
        match word(0) {
            PRESENT => self.resolve(number, None),
            FAILED => self.resolve(number, Some(String::from_utf8_lossy(&message).into_owned())),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "invalid message of the provider")),
        }
        Ok(())
    }

    /// Records the result of a request, and wakes the threads that wait for it.
    fn resolve(&self, number: Number, failure: Option<String>) {
        let mut requests = self.requests.lock();
        requests.pending.remove(&number);
        match failure {
            Some(message) => {
                requests.failed.insert(number, (Instant::now(), message));
            }
            None => {
                requests.failed.remove(&number);
                self.state(number).store(VERIFIED, Ordering::Release);
            }
        }
        let parked = requests.parked.remove(&number).unwrap_or_default();
        drop(requests);
        self.changed.notify_all();
        parked.into_iter().for_each(|notify| notify());
    }

    fn close(&self, error: &io::Error) {
        let mut requests = self.requests.lock();
        requests.closed = Some(match error.kind() {
            io::ErrorKind::UnexpectedEof => "the process that reads the store has ended".to_owned(),
            _ => format!("lost the connection to the process that reads the store: {error}"),
        });
        let parked = std::mem::take(&mut requests.parked);
        drop(requests);
        self.changed.notify_all();
        parked.into_values().flatten().for_each(|notify| notify());
    }
}
