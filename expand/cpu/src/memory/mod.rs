//! Guest memory as instructions see it: linear addresses, rights, and what lies behind them.

pub(crate) mod access;
pub(crate) mod journal;
pub(crate) mod low_memory;
pub(crate) mod physical;
#[cfg(test)]
pub(crate) mod spy;
pub(crate) mod tlb;
pub(crate) mod walk;

use reprise_machine::ram::GuestRam;
use reprise_trace::instructions::{NOWHERE_PAGE, PageWalk};

use crate::fault::Fault;
use crate::mode::Mode;
use journal::Journal;
use physical::{PAGE_BYTES, Physical};
use tlb::{Tlb, TlbState, rights};
use walk::{Accessor, Kind, Paging, Path, Translation};

/// What a linear page turned out to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Page {
    /// RAM: the guest-physical page.
    Ram { physical: u64 },
    /// No RAM: the guest-physical page.
    Mmio { physical: u64 },
}

impl Page {
    /// The guest-physical page.
    pub(crate) fn physical(self) -> u64 {
        let (Self::Ram { physical } | Self::Mmio { physical }) = self;
        physical
    }
}

/// Paging, the software TLB and physical memory.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) physical: Physical,
    tlb: Tlb,
    paging: Paging,
    user: bool,
    /// RFLAGS.AC: overrides SMAP for explicit accesses.
    smap_overridden: bool,
    /// The TLB tables that fast accesses use.
    table: usize,
    /// Code in the upper half of the address space was fetched through a page that is not global.
    upper_code_moves: bool,
    /// Walks of page tables so far.
    pub(crate) page_walks: u64,
    /// Walks that a trace does not have yet, if it wants them.
    pub(crate) walks: Option<Vec<PageWalk>>,
    /// Alignment is checked.
    pub(crate) check_alignment: bool,
    /// Data breakpoints are checked.
    pub(crate) check_breakpoints: bool,
    #[cfg(test)]
    pub(crate) spy: spy::Spy,
}

/// The rights that data accesses have in a mode.
fn rights_in(mode: Mode) -> usize {
    if mode.has(Mode::USER) {
        rights::USER
    } else if mode.has(Mode::USER_PAGES_FORBIDDEN) {
        rights::SUPERVISOR_ONLY
    } else {
        rights::SUPERVISOR
    }
}

/// Where generated code finds in [`Memory`] which rights apply to supervisor code, and what it puts
/// there: both are kept by [`Memory::set_rights`].
pub(crate) mod access_state {
    use std::mem::offset_of;

    use super::{Memory, Mode, rights_in};

    /// A byte: RFLAGS.AC.
    pub(crate) const OVERRIDDEN: usize = offset_of!(Memory, smap_overridden);
    /// A word of 64 bits: see [`table`].
    pub(crate) const TABLE: usize = offset_of!(Memory, table);

    /// What fast accesses use in a mode of supervisor code.
    pub(crate) fn table(mode: Mode) -> i32 {
        rights_in(mode) as i32
    }
}

impl Memory {
    /// # Errors
    /// If the host refuses the memory for the software TLB.
    pub(crate) fn new(ram: GuestRam) -> std::io::Result<Self> {
        Ok(Self {
            physical: Physical::new(ram),
            tlb: Tlb::new()?,
            paging: Paging::default(),
            user: false,
            smap_overridden: false,
            table: rights::SUPERVISOR,
            upper_code_moves: false,
            page_walks: 0,
            walks: None,
            check_alignment: false,
            check_breakpoints: false,
            #[cfg(test)]
            spy: spy::Spy::default(),
        })
    }

    /// Takes over control registers and forgets every translation.
    pub(crate) fn set_paging(&mut self, cr0: u64, cr3: u64, cr4: u64, efer: u64) {
        self.paging = Paging { cr0, cr3, cr4, efer };
        self.tlb.flush();
        self.tlb.forget_code_pages();
        self.choose_table();
    }

    /// Takes over CR3 and forgets every translation that is not global. Gives whether code in the
    /// upper half of the address space may lie elsewhere now.
    pub(crate) fn set_root(&mut self, cr3: u64) -> bool {
        self.paging.cr3 = cr3;
        self.tlb.flush_local();
        std::mem::take(&mut self.upper_code_moves)
    }

    /// Sets under which rights accesses run from now on.
    pub(crate) fn set_rights(&mut self, user: bool, smap_overridden: bool) {
        self.user = user;
        self.smap_overridden = smap_overridden;
        self.choose_table();
    }

    /// Sets which checks every access takes beyond paging.
    pub(crate) fn set_checks(&mut self, alignment: bool, breakpoints: bool) {
        self.check_alignment = alignment;
        self.check_breakpoints = breakpoints;
        self.choose_table();
    }

    /// Keeps a journal of what is done to memory from now on, or no longer.
    pub(crate) fn keep_journal(&mut self, wanted: bool) {
        self.physical.journal = wanted.then(Box::<Journal>::default);
        self.choose_table();
    }

    fn choose_table(&mut self) {
        let asks_always = self.check_alignment || self.check_breakpoints;
        // Only what asks is noted.
        self.table = if asks_always || self.physical.journal.is_some() {
            rights::NONE
        } else {
            self.rights_of(self.accessor())
        };
    }

    /// Who explicit accesses come from.
    fn accessor(&self) -> Accessor {
        Accessor {
            user: self.user,
            user_pages_forbidden: !self.user && self.paging.smap() && !self.smap_overridden,
        }
    }

    /// Who implicit system accesses (descriptor tables, TSS, IDT) come from.
    fn system_accessor(&self) -> Accessor {
        Accessor { user: false, user_pages_forbidden: self.paging.smap() }
    }

    fn rights_of(&self, accessor: Accessor) -> usize {
        if accessor.user {
            rights::USER
        } else if accessor.user_pages_forbidden {
            rights::SUPERVISOR_ONLY
        } else {
            rights::SUPERVISOR
        }
    }

    /// The host address of `size` bytes that may be read without asking further.
    #[inline(always)]
    pub(crate) fn hit_read(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let found = self.tlb.hit_read(self.table, linear, size);
        #[cfg(test)]
        if found.is_some() {
            self.spy.note(linear, size, false);
        }
        found
    }

    /// The host address of `size` bytes that may be written without asking or noting anything.
    #[inline(always)]
    pub(crate) fn hit_write(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let found = self.tlb.hit_write(self.table, linear, size);
        #[cfg(test)]
        if found.is_some() {
            self.spy.note(linear, size, true);
        }
        found
    }

    /// Translates one page for an explicit data access, and remembers it if it may be.
    pub(crate) fn data_page(&mut self, linear: u64, write: bool) -> Result<Page, Fault> {
        let accessor = self.accessor();
        self.page(linear, write, accessor)
    }

    /// Translates one page for an implicit system access.
    pub(crate) fn system_page(&mut self, linear: u64, write: bool) -> Result<Page, Fault> {
        let accessor = self.system_accessor();
        self.page(linear, write, accessor)
    }

    fn page(&mut self, linear: u64, write: bool, accessor: Accessor) -> Result<Page, Fault> {
        let rights = self.rights_of(accessor);
        let physical = match self.tlb.known_data(rights, write, linear) {
            Some(physical) => physical,
            None => self.walk_data(linear, write, accessor, rights)?,
        };
        let Some(host) = self.physical.host_page(physical) else {
            return Ok(Page::Mmio { physical });
        };
        if !write || self.physical.permit_writes(physical) {
            self.tlb.permit(rights, write, linear, host);
        }
        Ok(Page::Ram { physical })
    }

    fn walk_data(
        &mut self,
        linear: u64,
        write: bool,
        accessor: Accessor,
        rights: usize,
    ) -> Result<u64, Fault> {
        let kind = if write { Kind::Write } else { Kind::Read };
        let found = self.translate(linear, kind, accessor)?;
        // What may be written may be read.
        self.tlb.learn_data(rights, false, linear, found);
        if write {
            self.tlb.learn_data(rights, true, linear, found);
        }
        Ok(found.page)
    }

    /// Under which rights the instruction in hand accesses memory: see [`Memory::seen_address`].
    pub(crate) fn present_rights(&self) -> usize {
        self.rights_of(self.accessor())
    }

    /// The guest-physical address that an access by an instruction has just had, under these rights, or
    /// that it would have had: as [`Physical::to_guest`] takes it.
    pub(crate) fn seen_address(&self, rights: usize, write: bool, linear: u64) -> u64 {
        let known = self.tlb.known_data(rights, write, linear);
        let page = known.or_else(|| self.paging.look(&self.physical, linear));
        Physical::guest_place(page.unwrap_or(NOWHERE_PAGE) + linear % PAGE_BYTES)
    }

    /// [`Memory::seen_address`] as it is in the guest.
    pub(crate) fn seen_guest_address(&self, rights: usize, write: bool, linear: u64) -> u64 {
        let mut place = [self.seen_address(rights, write, linear)];
        self.physical.to_guest(&mut place);
        place[0]
    }

    /// The guest-physical address of a byte to fetch.
    pub(crate) fn fetch_address(&mut self, linear: u64) -> Result<u64, Fault> {
        let accessor = Accessor { user: self.user, user_pages_forbidden: false };
        let table = self.rights_of(accessor);
        let page = linear & !(PAGE_BYTES - 1);
        let physical = match self.tlb.known_fetch(table, page) {
            Some(physical) => physical,
            None => {
                let found = self.translate(linear, Kind::Fetch, accessor)?;
                self.tlb.learn_fetch(table, page, found);
                found.page
            }
        };
        Ok(physical + linear % PAGE_BYTES)
    }

    /// Where the page of `linear` lies, by a walk.
    fn translate(
        &mut self,
        linear: u64,
        kind: Kind,
        accessor: Accessor,
    ) -> Result<Translation, Fault> {
        self.page_walks += 1;
        let mut path = Path::default();
        let found = self.paging.translate(&mut self.physical, linear, kind, accessor, &mut path);
        if let Some(walks) = &mut self.walks {
            let page = found.as_ref().ok().map(|found| found.page);
            walks.extend(path.walk(&self.paging, (linear, kind), page));
        }
        let found = found?;
        self.tlb.note(linear, found, kind == Kind::Fetch);
        self.upper_code_moves |= kind == Kind::Fetch && !found.global && linear >> 63 != 0;
        Ok(found)
    }

    /// INVLPG. Gives whether code may have been fetched through the translation.
    pub(crate) fn flush_page(&mut self, linear: u64) -> bool {
        self.tlb.flush_page(linear)
    }

    /// Marks a range within one page as decoded code, so that writes to it are noticed.
    pub(crate) fn mark_code(&mut self, address: u64, size_bytes: u64) {
        if let Some(host_page) = self.physical.mark_code(address, size_bytes) {
            self.tlb.forbid_writes(host_page);
        }
    }

    /// What is known of translations.
    pub(crate) fn saved_translations(&self) -> TlbState {
        self.tlb.save()
    }

    /// Knows the saved translations and no others; false if no TLB ever knows those. No block may be
    /// remembered by its linear address.
    pub(crate) fn load_translations(&mut self, saved: &TlbState) -> bool {
        let loaded = self.tlb.load(saved);
        self.upper_code_moves |= self.tlb.knows_local_upper_code();
        loaded
    }

    /// See [`Physical::start_capture`].
    pub(crate) fn start_capture(&mut self) {
        self.forbid_all_writes();
        self.physical.start_capture();
    }

    /// Takes back every permission to write without asking.
    pub(crate) fn forbid_all_writes(&mut self) {
        self.tlb.forbid_all_writes();
    }

    /// Where the software TLB's entries for data accesses in `mode` begin: less than 2^31. (Not for
    /// code that runs with checks of alignment or breakpoints.)
    pub(crate) fn table_address(&self, mode: Mode, write: bool) -> i32 {
        self.tlb.table_address(rights_in(mode), write)
    }
}
