//! Guest RAM that two machines have in common, by page. Pages are shared between images, so keeping
//! many of them costs little.

use std::collections::BTreeMap;
use std::sync::Arc;

use reprise_machine::ram::{GuestRam, RamError};
use reprise_trace::checkpoint::PAGE_BYTES;

/// A page of guest RAM.
pub(crate) type Page = Box<[u8; PAGE_BYTES]>;

/// What a page that is not there holds.
static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// RAM at a moment; pages of zeros are left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pages: BTreeMap<u64, Arc<[u8; PAGE_BYTES]>>,
}

impl Image {
    pub(crate) fn set(&mut self, address: u64, page: Page) {
        if *page == ZEROS {
            self.pages.remove(&address);
        } else {
            self.pages.insert(address, page.into());
        }
    }

    /// Puts all of it into RAM of zeros.
    pub(crate) fn fill(&self, ram: &mut GuestRam) {
        for (address, page) in &self.pages {
            // They come from RAM of the same size.
            let placed = ram.place(*address, &page[..]);
            debug_assert!(placed, "page {address:#x} lies in RAM");
        }
    }

    /// RAM with this in it, for whoever reads page tables and code.
    pub(crate) fn to_ram(&self, ram_mib: u64) -> Result<GuestRam, RamError> {
        let mut ram = GuestRam::new(ram_mib)?;
        self.fill(&mut ram);
        Ok(ram)
    }
}
