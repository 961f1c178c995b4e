//! Private mappings of a base, in the process of a clone that is received and does not run yet.
//!
//! UFFDIO_COPY maps a received page without an access to the base: it neither reads a hole of the base, nor waits for its
//! pager. A page that is mapped, because an earlier round has placed it or the process has accessed it, is written with
//! process_vm_writev(2); if it is a page of the base, the kernel copies it first.

use std::io;

use crate::SMALL_PAGE;
use crate::segment::Segment;
use crate::space::Space;
use crate::trace::Userfaults;
use crate::uapi::Userfault;

static ZEROS: [u8; SMALL_PAGE] = [0; SMALL_PAGE];

/// Private mappings, registered for missing faults.
#[derive(Debug)]
pub struct PrivateMappings {
    segments: Vec<Segment>,
    userfaults: Userfaults,
}

impl PrivateMappings {
    /// Creates the object. `userfaults` are the userfaultfds with which the segments are registered.
    pub fn new(segments: Vec<Segment>, userfaults: Userfaults) -> Self {
        Self { segments, userfaults }
    }

    /// Replaces pages `[first, end)` of a region by private copies of `contents`.
    ///
    /// # Errors
    /// EFAULT if a page is not mapped by the segments, ENOENT if a process has no userfaultfd, ESRCH if the process has
    /// exited; otherwise the error of UFFDIO_COPY or process_vm_writev(2).
    ///
    /// # Safety
    /// `contents` must be valid for reading these pages.
    pub unsafe fn copy(&self, region: usize, first: usize, end: usize, contents: *const u8) -> io::Result<()> {
        self.each_part(region, first, end, |space, uffd, address, len, at| {
            let contents = contents.wrapping_add(at);
            let mut done = 0;
            while done < len {
                // SAFETY: the caller guarantees that all pages can be read, of which these are a part.
                done += unsafe { uffd.copy(address + done, contents.wrapping_add(bytes(done)), len - done) }?;
                if done < len {
                    // SAFETY: as above; the page lies before `len`.
                    unsafe { write_page(space, address + done, contents.wrapping_add(bytes(done))) }?;
                    done += SMALL_PAGE as u64;
                }
            }
            Ok(())
        })
    }

    /// Replaces pages `[first, end)` of a region by private pages of zeros.
    ///
    /// # Errors
    /// The same errors as [`copy`](Self::copy).
    pub fn zero(&self, region: usize, first: usize, end: usize) -> io::Result<()> {
        self.each_part(region, first, end, |space, uffd, address, len, _| {
            let mut done = 0;
            while done < len {
                done += uffd.zero(address + done, len - done)?;
                if done < len {
                    // SAFETY: the static has the length of a page.
                    unsafe { write_page(space, address + done, ZEROS.as_ptr()) }?;
                    done += SMALL_PAGE as u64;
                }
            }
            Ok(())
        })
    }

    /// Calls `work` for each mapping of the pages, with its address and length, and with the position of the part in
    /// bytes from the first page.
    fn each_part(
        &self,
        region: usize,
        first: usize,
        end: usize,
        mut work: impl FnMut(&Space, &Userfault, u64, u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut mapped = 0;
        for segment in self.segments.iter().filter(|segment| segment.region == region) {
            let Some((address, len)) = segment.part(first, end) else { continue };
            let found = self.userfaults.get(&segment.space.pid());
            let uffd = found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
            let page = segment.pages(address, address).0;
            work(&segment.space, uffd, address, len, (page - first) * SMALL_PAGE)?;
            mapped += bytes(len);
        }
        // A page that is not mapped would be lost.
        if mapped < (end - first) * SMALL_PAGE { Err(io::Error::from_raw_os_error(libc::EFAULT)) } else { Ok(()) }
    }
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Writes a page of another process.
///
/// # Safety
/// `contents` must be valid for reading a page.
unsafe fn write_page(space: &Space, address: u64, contents: *const u8) -> io::Result<()> {
    let mut done = 0;
    while done < SMALL_PAGE {
        let rest = SMALL_PAGE - done;
        let local = libc::iovec { iov_base: contents.wrapping_add(done).cast_mut().cast(), iov_len: rest };
        let remote = libc::iovec { iov_base: (address + done as u64) as *mut libc::c_void, iov_len: rest };
        // SAFETY: the caller guarantees that the page can be read, and the call does not write to it. The kernel checks
        // the remote address.
        let written = unsafe { libc::process_vm_writev(space.pid(), &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(count) => done += count,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}
