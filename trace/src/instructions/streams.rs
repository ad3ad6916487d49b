//! The columns that carry nearly everything: blocks, addresses and pages. What comes as expected is
//! only counted; each surprise is stored with the count of what went before it.

use super::block::{BlockRef, PAGE_BYTES};
use super::columns::{Column, ColumnReaders, Columns};
use super::head::Fault;
use super::predict::{
    AddressPredictor, BlockPredictor, CANDIDATES, KnownBlock, Leads, NONE, PagePredictor, Place,
    Surprise,
};
use crate::varint::{put, put_difference};

/// What a surprising block is: up to `LAST_ALTERNATIVE` the alternative of that number.
mod block_code {
    pub(super) const LAST_ALTERNATIVE: u8 = 2;
    /// The next block that was not met before.
    pub(super) const NEW: u8 = 3;
    /// One given by its number.
    pub(super) const NUMBER: u8 = 4;
}

/// What a surprising address is: the candidate of that number, or from here on a difference of so many
/// bytes, less one, to one of the origins.
const DIFFERENCES: u8 = CANDIDATES as u8;
/// Behind the last code.
const ADDRESS_CODES: u8 = DIFFERENCES + 16;

/// Which blocks ran.
pub(super) struct BlockStream {
    pub(super) predictor: BlockPredictor,
    /// Writing: runs up to the last surprise. Reading: runs before the next.
    surprise: u64,
    /// Blocks met so far.
    met: u32,
}

impl BlockStream {
    pub(super) fn new() -> Self {
        Self { predictor: BlockPredictor::new(), surprise: 0, met: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        (self.surprise, self.met) = (0, 0);
    }

    /// A block gets the next number; its sites have been added from `first_site` on.
    pub(super) fn add(&mut self, block: BlockRef<'_>, first_site: usize) -> u32 {
        self.predictor.blocks.push(KnownBlock::new(block, first_site));
        self.predictor.blocks.len() as u32 - 1
    }

    /// How many blocks there are.
    pub(super) fn count(&self) -> usize {
        self.predictor.blocks.len()
    }

    /// Appends the number of the block of a run, which was not expected. `runs` came before it.
    #[cold]
    #[inline(never)]
    pub(super) fn put_surprise(
        &mut self,
        columns: &mut Columns,
        place: Place,
        id: u32,
        runs: u64,
    ) -> Leads {
        put(columns.get(Column::BlockHits), runs - self.surprise);
        self.surprise = runs + 1;
        let code = if id == self.met {
            self.met += 1;
            block_code::NEW
        } else if let Some(number) = self.predictor.alternatives(place).position(|one| one == id) {
            number as u8
        } else {
            put(columns.get(Column::BlockNumbers), u64::from(id));
            block_code::NUMBER
        };
        columns.get(Column::BlockCodes).push(code);
        self.predictor.settle(place, id);
        self.predictor.blocks[id as usize].leads()
    }

    /// Ends a segment of so many runs.
    pub(super) fn finish(&self, columns: &mut Columns, runs: u64) {
        put(columns.get(Column::BlockHits), runs - self.surprise);
    }

    /// Starts to read a segment whose blocks were added.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        self.surprise = columns.get(Column::BlockHits).varint()?;
        Ok(())
    }

    /// The number of the next run's block, and what is known of it. `runs` came before.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        columns: &mut ColumnReaders,
        runs: u64,
    ) -> Result<(u32, KnownBlock), Fault> {
        let mut place = self.predictor.place;
        let id = if runs == self.surprise {
            self.take_surprise(columns, place)?
        } else {
            place.expected
        };
        // Whatever was met has been taken before, so only a new one can be out of bounds.
        if id >= self.met {
            return Err(Fault("it runs a block that it does not have"));
        }
        let block = self.predictor.blocks[id as usize];
        self.predictor.next(&mut place, id, block.leads());
        self.predictor.place = place;
        Ok((id, block))
    }

    /// Takes runs as expected of blocks that do not vary, until a surprise is due, at most as many as
    /// there is room for in `accesses`, which gets the first site of each and their number. Gives how
    /// many there are, and how many instructions retire in them.
    #[inline(always)]
    pub(super) fn take_expected(
        &mut self,
        runs: u64,
        accesses: &mut [(u32, u32)],
        numbers: &mut Vec<u32>,
    ) -> Result<(usize, u64), Fault> {
        let mut place = self.predictor.place;
        let (mut taken, mut retired) = (0, 0);
        let most = accesses.len().min((self.surprise - runs) as usize);
        for accesses in &mut accesses[..most] {
            let id = place.expected;
            let block = self.predictor.blocks.get(id as usize).filter(|_| id < self.met);
            let block = *block.ok_or(Fault("it runs a block that it does not have"))?;
            if block.varies {
                break;
            }
            numbers.push(id);
            *accesses = (block.first_site, block.access_count);
            retired += u64::from(block.instruction_count);
            self.predictor.next(&mut place, id, block.leads());
            taken += 1;
        }
        self.predictor.place = place;
        Ok((taken, retired))
    }

    #[cold]
    #[inline(never)]
    fn take_surprise(&mut self, columns: &mut ColumnReaders, place: Place) -> Result<u32, Fault> {
        let id = match columns.get(Column::BlockCodes).byte()? {
            code @ ..=block_code::LAST_ALTERNATIVE => {
                self.predictor.alternatives(place).nth(usize::from(code)).unwrap_or(NONE)
            }
            block_code::NEW if (self.met as usize) < self.count() => {
                self.met += 1;
                self.met - 1
            }
            block_code::NUMBER => {
                let number = columns.get(Column::BlockNumbers).varint()?;
                u32::try_from(number).unwrap_or(NONE)
            }
            _ => return Err(Fault("a surprising block is of no kind, or of none that it has")),
        };
        let hits = columns.get(Column::BlockHits).varint()?;
        self.surprise = self.surprise.saturating_add(1).saturating_add(hits);
        self.predictor.settle(place, id);
        Ok(id)
    }

    /// Whether a reader met all blocks, and expects no more than so many runs.
    pub(super) fn is_at_end(&self, runs: u64) -> bool {
        self.surprise == runs && self.met as usize == self.count()
    }
}

/// Which addresses were accessed.
pub(super) struct AddressStream {
    predictor: AddressPredictor,
    /// Reading: accesses so far.
    passed: u64,
    /// Writing: accesses up to the last surprise. Reading: accesses before the next.
    surprise: u64,
}

impl AddressStream {
    pub(super) fn new() -> Self {
        Self { predictor: AddressPredictor::new(), passed: 0, surprise: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        (self.passed, self.surprise) = (0, 0);
    }

    /// Adds the sites of the next block, in order, and gives the number of the first.
    pub(super) fn add(&mut self, block: BlockRef<'_>) -> usize {
        let first = self.predictor.sites.len();
        self.predictor.add(block);
        first
    }

    /// Appends addresses of as many sites from `first_site` on; `before` came before them.
    #[inline(always)]
    pub(super) fn put(
        &mut self,
        columns: &mut Columns,
        first_site: usize,
        addresses: &[u64],
        before: u64,
    ) {
        let AddressPredictor { sites, cells, .. } = &mut self.predictor;
        let sites = &mut sites[first_site..][..addresses.len()];
        for number in 0..addresses.len() {
            let (site, address) = (&mut sites[number], addresses[number]);
            if site.expected(cells) != address {
                let before = before + number as u64;
                return self.put_rest(columns, first_site + number, &addresses[number..], before);
            }
            site.pass(cells, address);
        }
    }

    /// The same, where the first is a surprise.
    #[inline(never)]
    fn put_rest(
        &mut self,
        columns: &mut Columns,
        first_site: usize,
        addresses: &[u64],
        before: u64,
    ) {
        for (number, address) in addresses.iter().enumerate() {
            let AddressPredictor { sites, cells, .. } = &mut self.predictor;
            let site = &mut sites[first_site + number];
            if site.expected(cells) == *address {
                site.pass(cells, *address);
                continue;
            }
            let before = before + number as u64;
            put(columns.get(Column::AddressHits), before - self.surprise);
            self.surprise = before + 1;
            let surprise = self.predictor.surprise(first_site + number);
            put_surprise(columns, &surprise, *address);
            self.predictor.settle(first_site + number, &surprise, *address);
        }
    }

    /// Ends a segment of so many accesses.
    pub(super) fn finish(&self, columns: &mut Columns, accesses: u64) {
        put(columns.get(Column::AddressHits), accesses - self.surprise);
    }

    /// Starts to read a segment whose sites were added.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        let hits = columns.get(Column::AddressHits).varint()?;
        self.surprise = self.passed.saturating_add(hits);
        Ok(())
    }

    /// Takes the addresses of `count` sites from `first_site` on.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        columns: &mut ColumnReaders,
        first_site: usize,
        count: usize,
        out: &mut Vec<u64>,
    ) -> Result<(), Fault> {
        if self.surprise - self.passed < count as u64 {
            return self.take_with_surprises(columns, first_site, count, out);
        }
        let AddressPredictor { sites, cells, .. } = &mut self.predictor;
        out.extend(sites[first_site..first_site + count].iter_mut().map(|site| {
            let address = site.expected(cells);
            site.pass(cells, address);
            address
        }));
        self.passed += count as u64;
        Ok(())
    }

    #[inline(never)]
    fn take_with_surprises(
        &mut self,
        columns: &mut ColumnReaders,
        first_site: usize,
        count: usize,
        out: &mut Vec<u64>,
    ) -> Result<(), Fault> {
        for number in first_site..first_site + count {
            let is_surprise = self.passed == self.surprise;
            self.passed += 1;
            if is_surprise {
                self.start(columns)?;
                let surprise = self.predictor.surprise(number);
                let address = take_surprise(columns, &surprise)?;
                self.predictor.settle(number, &surprise, address);
                out.push(address);
            } else {
                let AddressPredictor { sites, cells, .. } = &mut self.predictor;
                let address = sites[number].expected(cells);
                sites[number].pass(cells, address);
                out.push(address);
            }
        }
        Ok(())
    }

    /// Whether a reader expects no more addresses.
    pub(super) fn is_at_end(&self) -> bool {
        self.passed == self.surprise
    }
}

/// Appends an address that was not expected.
#[inline]
fn put_surprise(columns: &mut Columns, surprise: &Surprise, address: u64) {
    let code = match surprise.candidates.iter().position(|one| *one == address) {
        Some(candidate) => candidate,
        None => {
            let [last, base] =
                surprise.origins().map(|origin| zigzag(address.wrapping_sub(origin)));
            let (origin, difference) = if last <= base { (0, last) } else { (1, base) };
            let length = (64 - difference.leading_zeros()).div_ceil(8).max(1) as usize;
            let out = columns.get(Column::AddressBytes);
            let end = out.len() + length;
            // All eight, since that takes a store and no call.
            out.extend_from_slice(&difference.to_le_bytes());
            out.truncate(end);
            usize::from(DIFFERENCES) + 8 * origin + length - 1
        }
    };
    columns.get(Column::AddressCodes).push(code as u8);
}

/// Takes an address that was not expected.
fn take_surprise(columns: &mut ColumnReaders, surprise: &Surprise) -> Result<u64, Fault> {
    let code = columns.get(Column::AddressCodes).byte()?;
    match surprise.candidates.get(usize::from(code)) {
        Some(candidate) => Ok(*candidate),
        None if code < ADDRESS_CODES => {
            let code = usize::from(code - DIFFERENCES);
            let length = code % 8 + 1;
            let mut difference = [0; 8];
            difference[..length].copy_from_slice(columns.get(Column::AddressBytes).bytes(length)?);
            let difference = unzigzag(u64::from_le_bytes(difference));
            Ok(surprise.origins()[code / 8].wrapping_add(difference))
        }
        None => Err(Fault("a surprising address is of no kind")),
    }
}

/// Which guest-physical pages were accessed.
pub(super) struct PageStream {
    predictor: PagePredictor,
    /// Reading: accesses so far.
    passed: u64,
    /// Writing: accesses up to the last surprise. Reading: accesses before the next.
    surprise: u64,
}

impl PageStream {
    pub(super) fn new() -> Self {
        Self { predictor: PagePredictor::new(), passed: 0, surprise: 0 }
    }

    /// Starts a segment.
    pub(super) fn clear(&mut self) {
        self.predictor.clear();
        (self.passed, self.surprise) = (0, 0);
    }

    /// Appends the guest-physical addresses behind linear ones; `before` came before them.
    #[inline]
    pub(super) fn put(
        &mut self,
        columns: &mut Columns,
        linear: &[u64],
        physical: &[u64],
        before: u64,
    ) {
        for (number, (linear, physical)) in linear.iter().zip(physical).enumerate() {
            let page = physical / PAGE_BYTES;
            if self.predictor.known(*linear) != Some(page) {
                self.put_unknown(columns, *linear, page, before + number as u64);
            }
        }
    }

    #[inline(never)]
    fn put_unknown(&mut self, columns: &mut Columns, linear: u64, page: u64, before: u64) {
        let expected = self.predictor.expected(linear);
        if expected != page {
            let out = columns.get(Column::Physical);
            put(out, before - self.surprise);
            put_difference(out, expected, page);
            self.surprise = before + 1;
        }
        self.predictor.take(linear, page);
    }

    /// Ends a segment of so many accesses.
    pub(super) fn finish(&self, columns: &mut Columns, accesses: u64) {
        put(columns.get(Column::Physical), accesses - self.surprise);
    }

    /// Starts to read a segment.
    pub(super) fn start(&mut self, columns: &mut ColumnReaders) -> Result<(), Fault> {
        let hits = columns.get(Column::Physical).varint()?;
        self.surprise = self.passed.saturating_add(hits);
        Ok(())
    }

    /// Takes the guest-physical addresses behind linear ones.
    pub(super) fn take(
        &mut self,
        columns: &mut ColumnReaders,
        linear: &[u64],
        out: &mut Vec<u64>,
    ) -> Result<(), Fault> {
        for linear in linear {
            let is_surprise = self.passed == self.surprise;
            self.passed += 1;
            let page = match self.predictor.known(*linear) {
                Some(page) if !is_surprise => page,
                _ => self.take_unknown(columns, *linear, is_surprise)?,
            };
            out.push((page * PAGE_BYTES) | (linear % PAGE_BYTES));
        }
        Ok(())
    }

    #[inline(never)]
    fn take_unknown(
        &mut self,
        columns: &mut ColumnReaders,
        linear: u64,
        is_surprise: bool,
    ) -> Result<u64, Fault> {
        let mut page = self.predictor.expected(linear);
        if is_surprise {
            page = columns.get(Column::Physical).difference(page)?;
            self.start(columns)?;
        }
        // Pages of 64-bit addresses; anything else is damage, and wraps.
        page %= 1 << 52;
        self.predictor.take(linear, page);
        Ok(page)
    }

    /// Whether a reader expects no more pages.
    pub(super) fn is_at_end(&self) -> bool {
        self.passed == self.surprise
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
