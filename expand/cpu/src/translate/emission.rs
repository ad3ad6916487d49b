//! A unit's code in the making: what every kind of instruction uses.

use std::mem::offset_of;

use iced_x86::InstructionInfoFactory;

use super::assembler::{Assembler, Host, Jump, Place, at, indexed};
use super::jump_cache::JumpCache;
use super::registers::{
    ADDEND, ADDRESS, Home, PAGE_SHIFT, SCRATCH, SHIFT, field, general_slot, home,
};
use super::site::{Exit, Site};
use super::thunks::Thunks;
use crate::cpu::{
    BLOCK_RIP, BUDGET, NO_SEGMENT, Registers, TRACE_ADDRESSES, TRACE_PHYSICAL, TRACE_WORDS,
    VECTORS_LOADED, ZERO,
};
use crate::decode::op::Op;
use crate::memory::physical::PAGE_BYTES;
use crate::memory::tlb::Entry;
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
}

/// What code out of the way does.
#[derive(Clone, Copy)]
enum ColdKind {
    /// Runs a site's operation in Rust and goes on at an address.
    /// Behind it the XMM registers must be loaded if they were before.
    Operation { resume: u64, with_vectors: bool },
    /// Loads the XMM registers and goes on at an address.
    LoadVectors { resume: u64 },
    /// Runs a site's operation in Rust and leaves.
    LastOperation,
    /// Leaves before the unit.
    WithoutBudget,
}

/// A piece of code out of the way.
struct Cold {
    /// The operation that it runs.
    number: usize,
    kind: ColdKind,
    /// What leads to it.
    jumps: Vec<Jump>,
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
/// How far a short jump reaches ahead and back.
const NEAR_AHEAD: usize = 127;
const NEAR_BACK: usize = 128;
/// Bytes of a jump in an island, and of the short one over it.
const ISLAND_JUMP_BYTES: usize = 5;
const OVER_BYTES: usize = 2;
/// An island has room for so many jumps from behind it.
const SPARE_ROOMS: usize = 3;
/// A jump that is not taken costs little, one that is taken a place in the host's branch predictor.
/// The check of an access hence jumps where it fails, and a short jump is all that leaves the flags
/// alone. Islands between instructions take those on to where the slow way is.
struct Islands {
    /// Jumps without an island yet, oldest first, with their cold code.
    pending: Vec<(Jump, usize)>,
    /// Islands, with where they lead.
    built: Vec<(usize, usize)>,
    /// Room for more.
    rooms: Vec<Jump>,
}

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

/// Whether an operation's memory operand lies at an address known when it is translated.
fn is_absolute(op: &Op) -> bool {
    op.index == ZERO && matches!(op.base, BLOCK_RIP | ZERO)
}

/// Whether [`Emission::linear_address`] can address an operation's memory operand: all but cut
/// addresses and a RIP-relative one with an index, which no encoding has.
pub(super) fn addressable(op: &Op) -> bool {
    let fits = i32::try_from(op.displacement as i64).is_ok();
    op.address_mask == u64::MAX && (is_absolute(op) || op.base != BLOCK_RIP && fits)
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
        let rooms = (0..SPARE_ROOMS).map(|_| code.room_for_jump()).collect();
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
            islands: Islands { pending: Vec::new(), built: Vec::new(), rooms },
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

    /// Takes the instructions that have run, up to the operation `number`, from the budget, and moves the
    /// trace's cursors past what it has of them: what every way out of the unit does.
    fn charge(&mut self, number: usize) {
        self.settle(80);
        self.move_slot(BUDGET, number as i32 + 1);
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

    /// The cold code of the operation in hand.
    fn slow_way(&mut self) -> usize {
        *self.current.get_or_insert_with(|| {
            let (number, kind) = (self.number, ColdKind::LastOperation);
            self.cold.push(Cold { number, kind, jumps: Vec::new() });
            self.cold.len() - 1
        })
    }

    /// What [`SCRATCH`] must be for [`Emission::slow_unless_found`] not to take the slow way.
    pub(super) fn found(&self) -> i32 {
        i32::from(self.surroundings.fast_loop)
    }

    /// The operation in hand takes its slow way unless [`SCRATCH`] says that something was found.
    pub(super) fn slow_unless_found(&mut self) {
        let cold = self.slow_way();
        self.cold_unless_found(cold);
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

    /// Goes to cold code unless [`SCRATCH`] says that something was found.
    fn cold_unless_found(&mut self, cold: usize) {
        if self.surroundings.fast_loop {
            let missing = self.code.jump_near_unless_rcx_one();
            self.lead_to_cold(missing, cold);
        } else {
            let found = self.code.jump_near_if_rcx_zero();
            let missing = self.code.jump_forward();
            self.code.land(found);
            self.cold[cold].jumps.push(missing);
        }
    }

    /// The operation in hand takes its slow way where condition `code` holds. Only where the guest's
    /// flags are not needed any more, not even by the slow way.
    pub(super) fn slow_if(&mut self, code: u8) {
        let cold = self.slow_way();
        let jump = self.code.jump_forward_if(code);
        self.cold[cold].jumps.push(jump);
    }

    /// The operation in hand takes its slow way if [`SCRATCH`] is zero.
    pub(super) fn slow_if_nothing(&mut self) {
        let cold = self.slow_way();
        let nothing = self.code.jump_near_if_rcx_zero();
        self.lead_to_cold(nothing, cold);
    }

    /// What follows runs with the rights that the other of STAC and CLAC gives; the mode that this is,
    /// or `None` if it cannot be emitted.
    pub(super) fn change_access(&mut self) -> Option<Mode> {
        let other = self.other_access?;
        self.other_access = Some(self.surroundings);
        self.surroundings = other;
        Some(other.mode)
    }

    /// A short jump leads to cold code, by an island.
    fn lead_to_cold(&mut self, jump: Jump, cold: usize) {
        let reachable = |place: usize| place + NEAR_BACK >= jump.end;
        let built = &self.islands.built;
        if let Some(&(place, _)) =
            built.iter().find(|(place, leads_to)| *leads_to == cold && reachable(*place))
        {
            return self.code.land_at(jump, place);
        }
        self.islands.rooms.retain(|room| reachable(room.end - ISLAND_JUMP_BYTES));
        if self.islands.rooms.is_empty() {
            return self.islands.pending.push((jump, cold));
        }
        let room = self.islands.rooms.remove(0);
        let place = self.build_island(room, cold);
        self.code.land_at(jump, place);
    }

    fn build_island(&mut self, room: Jump, cold: usize) -> usize {
        let place = self.code.fill_room(room);
        self.cold[cold].jumps.push(room);
        self.islands.built.push((place, cold));
        place
    }

    /// Sees that jumps which still need an island will have one in reach after another `bytes`.
    pub(super) fn settle(&mut self, bytes: usize) {
        let Some((oldest, _)) = self.islands.pending.first() else { return };
        let islands = self.islands.pending.len() * ISLAND_JUMP_BYTES;
        if self.code.length() + bytes + OVER_BYTES + islands > oldest.end + NEAR_AHEAD {
            let over = self.code.jump_near();
            self.build_pending();
            self.islands.rooms = (0..SPARE_ROOMS).map(|_| self.code.room_for_jump()).collect();
            self.code.land(over);
        }
    }

    fn build_pending(&mut self) {
        for (jump, cold) in std::mem::take(&mut self.islands.pending) {
            let here = self
                .islands
                .built
                .iter()
                .rev()
                .find(|(place, leads_to)| *leads_to == cold && *place > jump.end);
            let place = match here {
                Some(&(place, _)) => place,
                None => {
                    let room = self.code.room_for_jump();
                    self.build_island(room, cold)
                }
            };
            self.code.land_at(jump, place);
        }
    }

    /// [`ADDRESS`] = the linear address of the operation's memory operand, which is
    /// [`addressable`].
    pub(super) fn linear_address(&mut self, op: &Op) {
        self.effective_address(op);
        // ES, CS, SS and DS have no base in 64-bit mode.
        if op.segment != NO_SEGMENT && usize::from(op.segment) >= reprise_trace::cpu_state::FS {
            let base = offset_of!(Registers, segment_base) + usize::from(op.segment) * 8;
            self.code.load(ADDEND, field(base));
            self.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        }
    }

    /// [`ADDRESS`] = the memory operand's offset in its segment. Uses [`ADDEND`].
    pub(super) fn effective_address(&mut self, op: &Op) {
        self.settle(32);
        if is_absolute(op) {
            let base = if op.base == BLOCK_RIP { self.linear } else { 0 };
            return self.code.immediate(ADDRESS, base.wrapping_add(op.displacement));
        }
        let base = (op.base != ZERO).then(|| self.in_register(op.base, ADDRESS));
        let index = (op.index != ZERO).then(|| (self.in_register(op.index, ADDEND), op.scale));
        let displacement = op.displacement as i32;
        match (base, index) {
            (Some(base), None) if displacement == 0 => self.code.copy(ADDRESS, base),
            _ => self.code.lea(ADDRESS, Place { base, index, displacement }),
        }
    }

    /// A guest register's value in a host register, `spare` if it has none of its own.
    pub(super) fn in_register(&mut self, guest: u8, spare: Host) -> Host {
        match home(guest) {
            Home::Host(host) => host,
            Home::Memory(place) => {
                self.code.load(spare, place);
                spare
            }
        }
    }

    /// Translates the `size` bytes at [`ADDRESS`] through the software TLB: afterwards the operand lies
    /// at [`ADDRESS`] + [`ADDEND`]. Takes the slow way if they cannot be accessed without asking.
    pub(super) fn translate(&mut self, write: bool, size: u64) {
        self.settle(if self.traced { 112 } else { 64 });
        self.trace_access(write, size);
        self.find_entry(ADDRESS, write);
        // The last byte's distance from the tag's page, in pages, is what is found.
        let distance = size as i32 - 1 + self.found() * PAGE_BYTES as i32;
        self.code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, distance));
        self.code.shift_right(SCRATCH, SCRATCH, SHIFT);
        self.slow_unless_found();
        self.code.load(ADDEND, self.entry(write, offset_of!(Entry, addend)));
        self.trace_place();
    }

    /// Translates what a repeated string instruction accesses from `pointer` on, `count` elements of
    /// `size` bytes (a power of two up to 8): afterwards [`ADDEND`] leads from `pointer` to the host's
    /// address. Takes the slow way unless all of them lie in one known page.
    pub(super) fn translate_run(&mut self, pointer: Host, count: Host, write: bool, size: u64) {
        self.settle(64);
        let found = self.found();
        let scale = size.trailing_zeros() as u8;
        self.find_entry(pointer, write);
        // The last byte's distance from the tag's page, as in `translate`. A count of a page and more
        // might wrap around to where it began; with a count of zero nothing is accessed anyway.
        self.code.lea(SCRATCH, indexed(SCRATCH, pointer, 0, 0));
        self.code.lea(SCRATCH, indexed(SCRATCH, count, scale, -1));
        self.code.shift_right(SCRATCH, SCRATCH, SHIFT);
        self.code.shift_right(ADDRESS, count, SHIFT);
        self.code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, found));
        self.slow_unless_found();
        self.settle(16);
        self.code.load(ADDEND, self.entry(write, offset_of!(Entry, addend)));
    }

    /// [`ADDEND`] = the index, in units of half an entry, of the data TLB's entry for `address`;
    /// [`SCRATCH`] = its negated tag.
    fn find_entry(&mut self, address: Host, write: bool) {
        self.code.rotate_right(ADDEND, address, PAGE_SHIFT as u8);
        self.code.zero_extend_16(ADDEND, ADDEND);
        self.code.lea(ADDEND, indexed(ADDEND, ADDEND, 0, 0));
        self.code.load(SCRATCH, self.entry(write, offset_of!(Entry, negated_tag)));
    }

    /// A field of the entry that [`Emission::find_entry`] found.
    fn entry(&self, write: bool, offset: usize) -> Place {
        const { assert!(size_of::<Entry>() == 16) };
        let surroundings = self.surroundings;
        let table = if write { surroundings.write_table } else { surroundings.read_table };
        Place { base: None, index: Some((ADDEND, 3)), displacement: table + offset as i32 }
    }

    /// Takes the slow way unless [`ADDRESS`] is a multiple of 16.
    pub(super) fn require_alignment(&mut self) {
        const LOW_BITS_SHIFT: u64 = 60;
        self.settle(32);
        self.code.immediate(SCRATCH, LOW_BITS_SHIFT);
        self.code.shift_left(SCRATCH, ADDRESS, SCRATCH);
        let found = self.found();
        if found != 0 {
            self.code.lea(SCRATCH, at(SCRATCH, found));
        }
        self.slow_unless_found();
    }

    /// Looks for the code at [`ADDRESS`]: afterwards [`ADDEND`] points at its entry in the jump cache.
    /// Takes the slow way, which does all of the instruction, if there is none.
    pub(super) fn search(&mut self) {
        self.settle(64);
        let found = self.found();
        self.surroundings.jumps.emit_search(&mut self.code, found);
        self.slow_unless_found();
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
