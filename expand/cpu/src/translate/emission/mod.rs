//! A unit's code in the making: what every kind of instruction uses.

mod addressing;
mod slow_way;

use iced_x86::InstructionInfoFactory;

pub(super) use addressing::addressable;
use slow_way::{Cold, ColdKind, Islands};

use super::assembler::{Assembler, Jump, Place, at, indexed};
use super::jump_cache::JumpCache;
use super::registers::{ADDEND, ADDRESS, SCRATCH, general_slot};
use super::site::{Exit, Site};
use super::thunks::Thunks;
use crate::cpu::{BRANCHES, BUDGET, TRACE_ADDRESSES, TRACE_PHYSICAL, TRACE_WORDS, VECTORS_LOADED};
use crate::mode::Mode;
use crate::tracing::{Ahead, MAX_INLINE_ACCESSES};

/// What units of one mode know about the CPU.
pub(super) struct Surroundings<'a> {
    pub(super) mode: Mode,
    pub(super) thunks: Thunks,
    pub(super) jumps: &'a JumpCache,
    pub(super) read_table: i32,
    pub(super) write_table: i32,
    /// The host runs LOOP as fast as any other jump, as AMD's CPUs do.
    pub(super) fast_loop: bool,
    /// Somebody traces.
    pub(super) traced: bool,
    /// And wants to know where accesses lie.
    pub(super) traced_physical: bool,
    /// Somebody counts conditional branches.
    pub(super) counts_branches: bool,
}

/// A way out of the unit from its midst: where a conditional jump leads, and in which mode.
struct SideExit {
    jump: Jump,
    linear: u64,
    mode: Mode,
    /// The operation that it is behind.
    number: usize,
}

/// An exit, to be filled in.
pub(super) struct PlannedExit {
    pub(super) linear: u64,
    pub(super) mode: Mode,
    pub(super) exit: *mut Exit,
    /// The address of the code that leaves by it.
    pub(super) stub: u64,
}

/// A unit's code, finished.
pub(super) struct Finished {
    pub(super) hot: Vec<u8>,
    pub(super) cold: Vec<u8>,
    pub(super) exits: Vec<PlannedExit>,
}

/// Bytes of a word and of an address in a trace.
const WORD_BYTES: i32 = 4;
const ADDRESS_BYTES: i32 = 8;
/// A unit being translated: blocks of one page that run one after the other.
pub(super) struct Emission<'a> {
    pub(super) code: Assembler,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) surroundings: &'a Surroundings<'a>,
    /// The same behind the next STAC or CLAC, if that changes them.
    other_access: Option<&'a Surroundings<'a>>,
    /// The linear address of the block in hand, which in 64-bit mode is its RIP.
    pub(super) linear: u64,
    /// The sites of the unit's operations, in order: they have their place already.
    sites: &'a [Site],
    /// The operation in hand.
    number: usize,
    /// Its cold code, if it has a slow way.
    current: Option<usize>,
    /// The host has the guest's XMM registers for sure.
    vectors_loaded: bool,
    cold: Vec<Cold>,
    islands: Islands,
    side_exits: Vec<SideExit>,
    /// Exits to known addresses, with where they lead and in which mode.
    exits: Vec<(u64, Mode, *mut Exit)>,
    /// The unit appends to a trace.
    traced: bool,
    /// Accesses of the operation in hand that it appends so far.
    traced_accesses: usize,
    /// Where to put exits, in places that generated code can name: the first of them.
    first_exit: *mut Exit,
}

impl<'a> Emission<'a> {
    pub(super) fn new(
        address: u64,
        info: &'a mut InstructionInfoFactory,
        surroundings: &'a Surroundings<'a>,
        other_access: Option<&'a Surroundings<'a>>,
        sites: &'a [Site],
        first_exit: *mut Exit,
    ) -> Self {
        let mut code = Assembler::new(address);
        let islands = Islands::new(&mut code);
        Self {
            code,
            info,
            surroundings,
            other_access,
            linear: 0,
            sites,
            number: 0,
            current: None,
            vectors_loaded: false,
            cold: Vec::new(),
            islands,
            side_exits: Vec::new(),
            exits: Vec::new(),
            traced: surroundings.traced,
            traced_accesses: 0,
            first_exit,
        }
    }

    /// Leaves unless the budget allows the whole unit; where the unit is entered.
    pub(super) fn enter(&mut self) -> u64 {
        const SIGN_SHIFT: u64 = 63;
        let entry = self.code.here();
        self.code.load(ADDEND, general_slot(BUDGET));
        self.code.lea(ADDEND, at(ADDEND, self.sites.len() as i32));
        self.code.immediate(SCRATCH, SIGN_SHIFT);
        self.code.shift_right(SCRATCH, ADDEND, SCRATCH);
        let short = self.code.jump_near_if_rcx_zero();
        self.cold.push(Cold { number: 0, kind: ColdKind::WithoutBudget, jumps: Vec::new() });
        self.lead_to_cold(short, 0);
        entry
    }

    /// Takes the instructions that have run, up to the operation `number`, from the budget, counts the
    /// branches among them, and moves the trace's cursors past what it has of them: what every way out of
    /// the unit does.
    fn charge(&mut self, number: usize) {
        self.settle(100);
        self.move_slot(BUDGET, number as i32 + 1);
        let branches = self.sites[number].branches_past();
        if self.surroundings.counts_branches && branches != 0 {
            self.move_slot(BRANCHES, branches as i32);
        }
        if let Some(Ahead { words, addresses }) = self.traced_past(number) {
            self.move_slot(TRACE_WORDS, words as i32 * WORD_BYTES);
            if addresses != 0 {
                self.move_slot(TRACE_ADDRESSES, addresses as i32 * ADDRESS_BYTES);
                if self.surroundings.traced_physical {
                    self.move_slot(TRACE_PHYSICAL, addresses as i32 * ADDRESS_BYTES);
                }
            }
        }
    }

    fn move_slot(&mut self, slot: u8, by: i32) {
        let slot = general_slot(slot);
        self.code.load(SCRATCH, slot);
        self.code.lea(SCRATCH, at(SCRATCH, by));
        self.code.store(slot, SCRATCH);
    }

    /// What a trace has of the unit behind an operation, if there is one.
    fn traced_past(&self, number: usize) -> Option<Ahead> {
        self.traced.then(|| self.sites[number].traced_past())
    }

    /// Appends the number of a block, whose first operation is `number`, to the trace.
    pub(super) fn trace_block(&mut self, number: usize, id: u32) {
        self.settle(32);
        let place = (self.sites[number].traced.words as i32 - 1) * WORD_BYTES;
        self.code.load(SCRATCH, general_slot(TRACE_WORDS));
        self.code.store_immediate_32(at(SCRATCH, place), id);
    }

    /// Appends [`ADDRESS`] to the trace as the next access of the operation in hand.
    fn trace_access(&mut self, write: bool, size: u64) {
        if !self.traced {
            return;
        }
        let site = &self.sites[self.number];
        let access = site.accesses().get(self.traced_accesses).map(|planned| planned.access);
        let access = access.expect("an operation accesses what its description says");
        let (kind, size_bytes) = (access.kind, u64::from(access.size_bytes));
        assert!(kind.writes() == write && size_bytes == size, "{site:?}: {access:?}");
        assert!(self.traced_accesses < MAX_INLINE_ACCESSES, "translated code appends so many");
        let place = (site.traced.addresses as usize + self.traced_accesses) as i32 * ADDRESS_BYTES;
        self.code.load(SCRATCH, general_slot(TRACE_ADDRESSES));
        self.code.store(at(SCRATCH, place), ADDRESS);
    }

    /// Appends the host address of the access that [`Emission::trace_access`] has just noted.
    fn trace_place(&mut self) {
        if !self.traced {
            return;
        }
        if self.surroundings.traced_physical {
            let number = self.sites[self.number].traced.addresses as usize + self.traced_accesses;
            self.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
            self.code.immediate(ADDEND, 0);
            self.code.load(SCRATCH, general_slot(TRACE_PHYSICAL));
            self.code.store(at(SCRATCH, number as i32 * ADDRESS_BYTES), ADDRESS);
        }
        self.traced_accesses += 1;
    }

    /// Sees that the operation in hand, emitted in line, appends all its accesses.
    fn expect_traced(&self) {
        let site = &self.sites[self.number];
        if self.traced {
            assert_eq!(self.traced_accesses, site.accesses().len(), "{site:?}");
        }
    }

    /// Whether a trace wants to know an address of the operation in hand.
    pub(super) fn names_address(&self) -> bool {
        self.traced && !self.sites[self.number].accesses().is_empty()
    }

    /// Begins the operation `number` of the unit.
    pub(super) fn begin(&mut self, number: usize) {
        self.number = number;
        self.traced_accesses = 0;
    }

    /// Instructions of the unit before the one in hand.
    pub(super) fn before(&self) -> i32 {
        self.number as i32
    }

    /// Runs the operation in hand in Rust, in line.
    pub(super) fn run_operation(&mut self) {
        self.settle(32);
        self.code.immediate(ADDEND, self.site(self.number));
        self.code.call_to(self.surroundings.thunks.operation);
        self.vectors_loaded = false;
    }

    /// Runs the operation in hand, the unit's last, in Rust and leaves.
    pub(super) fn run_last_operation(&mut self) {
        self.settle(32);
        self.code.immediate(ADDEND, self.site(self.number));
        self.code.jump_to(self.surroundings.thunks.last_operation);
    }

    fn site(&self, number: usize) -> u64 {
        std::ptr::from_ref(&self.sites[number]) as u64
    }

    /// The operation in hand is done; its slow way comes back here.
    pub(super) fn end(&mut self) {
        self.expect_traced();
        let resume = self.code.here();
        if let Some(cold) = self.current.take() {
            let with_vectors = self.vectors_loaded;
            self.cold[cold].kind = ColdKind::Operation { resume, with_vectors };
        }
    }

    /// The same for one that ends the unit: its slow way leaves.
    pub(super) fn end_last(&mut self) {
        self.expect_traced();
        self.current = None;
    }

    /// Sees that the host's XMM registers are the guest's, from here on until Rust is called. Comes
    /// first in an operation.
    pub(super) fn need_vectors(&mut self) {
        if std::mem::replace(&mut self.vectors_loaded, true) {
            return;
        }
        self.settle(32);
        self.code.load(SCRATCH, general_slot(VECTORS_LOADED));
        let found = self.found();
        if found != 1 {
            self.code.lea(SCRATCH, at(SCRATCH, found - 1));
        }
        let (number, kind) = (self.number, ColdKind::LoadVectors { resume: 0 });
        let cold = self.cold.len();
        self.cold.push(Cold { number, kind, jumps: Vec::new() });
        self.cold_unless_found(cold);
        self.cold[cold].kind = ColdKind::LoadVectors { resume: self.code.here() };
    }

    /// What follows runs with the rights that the other of STAC and CLAC gives; the mode that this is,
    /// or `None` if it cannot be emitted.
    pub(super) fn change_access(&mut self) -> Option<Mode> {
        let other = self.other_access?;
        self.other_access = Some(self.surroundings);
        self.surroundings = other;
        Some(other.mode)
    }

    /// Leaves the unit for a known address where condition `code` holds.
    pub(super) fn exit_if(&mut self, code: u8, linear: u64) {
        self.settle(16);
        let jump = self.code.jump_forward_if(code);
        let (mode, number) = (self.surroundings.mode, self.number);
        self.side_exits.push(SideExit { jump, linear, mode, number });
    }

    /// Leaves the unit for the code whose address lies at `place`.
    pub(super) fn leave_through(&mut self, place: Place) {
        self.charge(self.number);
        self.settle(16);
        self.code.jump_indirect(place);
    }

    /// Leaves the unit for a known address.
    pub(super) fn exit_to(&mut self, linear: u64) {
        self.exit_after(linear, self.surroundings.mode, self.number);
    }

    fn exit_after(&mut self, linear: u64, mode: Mode, number: usize) {
        self.charge(number);
        self.settle(16);
        let exit = self.first_exit.wrapping_add(self.exits.len());
        self.code.jump_through(exit as u64);
        self.exits.push((linear, mode, exit));
    }

    /// Emits what is out of the way, to be executed at `cold_address`.
    pub(super) fn finish(mut self, cold_address: u64) -> Finished {
        for SideExit { jump, linear, mode, number } in std::mem::take(&mut self.side_exits) {
            self.code.land(jump);
            self.exit_after(linear, mode, number);
        }
        self.build_pending();
        let thunks = &self.surroundings.thunks;
        let mut away = Assembler::new(cold_address);
        for Cold { number, kind, jumps } in &self.cold {
            for &jump in jumps {
                self.code.land_on(jump, away.here());
            }
            away.immediate(ADDEND, self.site(*number));
            match *kind {
                ColdKind::Operation { resume, with_vectors } => {
                    let vectors = thunks.operation_with_vectors;
                    away.call_to(if with_vectors { vectors } else { thunks.operation });
                    away.jump_to(resume);
                }
                ColdKind::LoadVectors { resume } => {
                    away.call_to(thunks.load_vectors);
                    away.jump_to(resume);
                }
                ColdKind::LastOperation => away.jump_to(thunks.last_operation),
                ColdKind::WithoutBudget => away.jump_to(thunks.without_budget),
            }
        }
        let mut exits = Vec::new();
        for &(linear, mode, exit) in &self.exits {
            exits.push(PlannedExit { linear, mode, exit, stub: away.here() });
            away.immediate(ADDEND, exit as u64);
            away.jump_to(thunks.exit);
        }
        Finished { hot: self.code.finish(), cold: away.finish(), exits }
    }
}
