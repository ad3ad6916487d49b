//! The columns that carry nearly everything: blocks, addresses and pages. What comes as expected is
//! only counted; each surprise is stored with the count of what went before it.

use super::block::{BlockEnd, PAGE_BYTES, StaticAccess};
use super::columns::{Column, ColumnReaders, Columns};
use super::head::Fault;
use super::predict::{AddressPredictor, BlockPredictor, NONE, PagePredictor};
use crate::varint::{put, put_difference};

/// What a surprising block is: up to `LAST_ALTERNATIVE` the alternative of that number.
mod block_code {
    pub(super) const LAST_ALTERNATIVE: u8 = 2;
    /// The next block that was not met before.
    pub(super) const NEW: u8 = 3;
    /// One given by its number.
    pub(super) const NUMBER: u8 = 4;
}

/// What a surprising address is.
mod address_code {
    /// What the site's other rule gives.
    pub(super) const OTHER: u8 = 0;
    /// What followed the access before it last time.
    pub(super) const FOLLOWED: u8 = 1;
    /// From here: a difference of so many bytes, less one, to the site's last address.
    pub(super) const FROM_LAST: u8 = 2;
    /// From here: the same to what the site's other rule gives.
    pub(super) const FROM_OTHER: u8 = 10;
    /// Behind the last code.
    pub(super) const END: u8 = 18;
}

/// Which blocks ran.
pub(super) struct BlockStream {
    predictor: BlockPredictor,
    /// Writing: expected since the last surprise. Reading: to come before the next one.
    hits: u64,
    /// Blocks met so far.
    met: u32,
}

impl BlockStream {
    pub(super) fn new() -> Self {
        Self { predictor: BlockPredictor::new(), hits: 0, met: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        (self.hits, self.met) = (0, 0);
    }

    /// A block gets the next number.
    pub(super) fn add(&mut self, end: BlockEnd) {
        self.predictor.add(end);
    }

    /// Appends a block's number.
    #[inline]
    pub(super) fn put(&mut self, columns: &mut Columns, id: u32) {
        if self.predictor.expected() == id {
            self.hits += 1;
        } else {
            self.put_surprise(columns, id);
        }
        self.predictor.take(id);
    }

    fn put_surprise(&mut self, columns: &mut Columns, id: u32) {
        put(columns.get(Column::BlockHits), self.hits);
        self.hits = 0;
        let code = if id == self.met {
            self.met += 1;
            block_code::NEW
        } else if let Some(number) = self.predictor.alternatives().iter().position(|one| *one == id)
        {
            number as u8
        } else {
            put(columns.get(Column::BlockNumbers), u64::from(id));
            block_code::NUMBER
        };
        columns.get(Column::BlockCodes).push(code);
    }

    /// Ends a segment.
    pub(super) fn finish(&self, columns: &mut Columns) {
        put(columns.get(Column::BlockHits), self.hits);
    }

    /// Starts to read a segment whose blocks were added.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        self.hits = columns.get(Column::BlockHits).varint()?;
        Ok(())
    }

    /// The next block's number, below `count`.
    #[inline]
    pub(super) fn take(&mut self, columns: &mut ColumnReaders, count: u32) -> Result<u32, Fault> {
        let id = if self.hits > 0 {
            self.hits -= 1;
            self.predictor.expected()
        } else {
            self.take_surprise(columns)?
        };
        // Whatever was met has been taken before, so only a new one can be out of bounds.
        if id >= self.met.min(count) {
            return Err(Fault("it runs a block that it does not have"));
        }
        self.predictor.take(id);
        Ok(id)
    }

    fn take_surprise(&mut self, columns: &mut ColumnReaders) -> Result<u32, Fault> {
        let id = match columns.get(Column::BlockCodes).byte()? {
            code @ ..=block_code::LAST_ALTERNATIVE => {
                self.predictor.alternatives()[usize::from(code)]
            }
            block_code::NEW => {
                self.met += 1;
                self.met - 1
            }
            block_code::NUMBER => {
                let number = columns.get(Column::BlockNumbers).varint()?;
                u32::try_from(number).unwrap_or(NONE)
            }
            _ => return Err(Fault("a surprising block is of no kind")),
        };
        self.start(columns)?;
        Ok(id)
    }

    /// Whether a reader met this many blocks, and expects no more runs.
    pub(super) fn is_at_end(&self, count: u32) -> bool {
        self.hits == 0 && self.met == count
    }
}

/// Which addresses were accessed.
pub(super) struct AddressStream {
    predictor: AddressPredictor,
    /// Writing: expected since the last surprise. Reading: to come before the next one.
    hits: u64,
}

impl AddressStream {
    pub(super) fn new() -> Self {
        Self { predictor: AddressPredictor::new(), hits: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        self.hits = 0;
    }

    /// Adds the sites of the next block, in order, and gives the number of the first.
    pub(super) fn add(&mut self, accesses: &[StaticAccess]) -> usize {
        let first = self.predictor.sites.len();
        self.predictor.add(accesses);
        first
    }

    /// Appends addresses of as many sites from `first_site` on.
    #[inline]
    pub(super) fn put(&mut self, columns: &mut Columns, first_site: usize, addresses: &[u64]) {
        let mut previous = self.predictor.previous;
        for (number, address) in (first_site..).zip(addresses) {
            let AddressPredictor { sites, bases, .. } = &mut self.predictor;
            let site = &mut sites[number];
            if site.expected(bases).0 == *address {
                self.hits += 1;
                site.take(bases, *address);
            } else {
                self.predictor.previous = previous;
                self.put_surprise(columns, number, *address);
                let AddressPredictor { sites, bases, .. } = &mut self.predictor;
                sites[number].take(bases, *address);
            }
            previous = *address;
        }
        self.predictor.previous = previous;
    }

    fn put_surprise(&mut self, columns: &mut Columns, number: usize, address: u64) {
        put(columns.get(Column::AddressHits), self.hits);
        self.hits = 0;
        let surprise = self.predictor.surprise(number);
        let code = if address == surprise.other {
            address_code::OTHER
        } else if address == surprise.followed {
            address_code::FOLLOWED
        } else {
            let from_last = zigzag(address.wrapping_sub(surprise.last));
            let from_other = zigzag(address.wrapping_sub(surprise.other));
            let (code, difference) = if from_last <= from_other {
                (address_code::FROM_LAST, from_last)
            } else {
                (address_code::FROM_OTHER, from_other)
            };
            let length = (64 - difference.leading_zeros()).div_ceil(8).max(1) as usize;
            let bytes = difference.to_le_bytes();
            columns.get(Column::AddressBytes).extend_from_slice(&bytes[..length]);
            code + (length - 1) as u8
        };
        self.predictor.settle(surprise, address);
        columns.get(Column::AddressCodes).push(code);
    }

    /// Ends a segment.
    pub(super) fn finish(&self, columns: &mut Columns) {
        put(columns.get(Column::AddressHits), self.hits);
    }

    /// Starts to read a segment whose sites were added.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        self.hits = columns.get(Column::AddressHits).varint()?;
        Ok(())
    }

    /// Takes the addresses of `count` sites from `first_site` on.
    #[inline]
    pub(super) fn take(
        &mut self,
        columns: &mut ColumnReaders,
        first_site: usize,
        count: usize,
        out: &mut Vec<u64>,
    ) -> Result<(), Fault> {
        for number in first_site..first_site + count {
            let AddressPredictor { sites, bases, .. } = &mut self.predictor;
            let address = if self.hits > 0 {
                self.hits -= 1;
                sites[number].expected(bases).0
            } else {
                self.take_surprise(columns, number)?
            };
            let AddressPredictor { sites, bases, .. } = &mut self.predictor;
            sites[number].take(bases, address);
            self.predictor.previous = address;
            out.push(address);
        }
        Ok(())
    }

    fn take_surprise(&mut self, columns: &mut ColumnReaders, number: usize) -> Result<u64, Fault> {
        let surprise = self.predictor.surprise(number);
        let address = match columns.get(Column::AddressCodes).byte()? {
            address_code::OTHER => surprise.other,
            address_code::FOLLOWED => surprise.followed,
            code @ address_code::FROM_LAST..address_code::END => {
                let (first, from) = if code < address_code::FROM_OTHER {
                    (address_code::FROM_LAST, surprise.last)
                } else {
                    (address_code::FROM_OTHER, surprise.other)
                };
                let mut difference = [0; 8];
                let length = usize::from(code - first) + 1;
                difference[..length]
                    .copy_from_slice(columns.get(Column::AddressBytes).bytes(length)?);
                from.wrapping_add(unzigzag(u64::from_le_bytes(difference)))
            }
            _ => return Err(Fault("a surprising address is of no kind")),
        };
        self.predictor.settle(surprise, address);
        self.start(columns)?;
        Ok(address)
    }

    /// Whether a reader expects no more addresses.
    pub(super) fn is_at_end(&self) -> bool {
        self.hits == 0
    }
}

/// Which guest-physical pages were accessed.
pub(super) struct PageStream {
    predictor: PagePredictor,
    /// Writing: expected since the last surprise. Reading: to come before the next one.
    hits: u64,
}

impl PageStream {
    pub(super) fn new() -> Self {
        Self { predictor: PagePredictor::new(), hits: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        self.hits = 0;
    }

    /// Appends the guest-physical address behind a linear one.
    pub(super) fn put(&mut self, columns: &mut Columns, linear: u64, physical: u64) {
        let (expected, page) = (self.predictor.expected(linear), physical / PAGE_BYTES);
        if expected == page {
            self.hits += 1;
        } else {
            let out = columns.get(Column::Physical);
            put(out, self.hits);
            put_difference(out, expected, page);
            self.hits = 0;
        }
        self.predictor.take(linear, page);
    }

    /// Ends a segment.
    pub(super) fn finish(&self, columns: &mut Columns) {
        put(columns.get(Column::Physical), self.hits);
    }

    /// Starts to read a segment.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        self.hits = columns.get(Column::Physical).varint()?;
        Ok(())
    }

    /// The guest-physical address behind a linear one.
    pub(super) fn take(&mut self, columns: &mut ColumnReaders, linear: u64) -> Result<u64, Fault> {
        let mut page = self.predictor.expected(linear);
        if self.hits > 0 {
            self.hits -= 1;
        } else {
            page = columns.get(Column::Physical).difference(page)?;
            self.start(columns)?;
        }
        // Pages of 64-bit addresses; anything else is damage, and wraps.
        page %= 1 << 52;
        self.predictor.take(linear, page);
        Ok((page * PAGE_BYTES) | (linear % PAGE_BYTES))
    }

    /// Whether a reader expects no more pages.
    pub(super) fn is_at_end(&self) -> bool {
        self.hits == 0
    }
}

/// Small differences in either direction as small numbers.
fn zigzag(difference: u64) -> u64 {
    let signed = difference as i64;
    (signed << 1 ^ signed >> 63) as u64
}

fn unzigzag(coded: u64) -> u64 {
    coded >> 1 ^ (coded & 1).wrapping_neg()
}
