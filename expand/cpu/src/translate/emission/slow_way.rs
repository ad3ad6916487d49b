//! The way from an instruction's code to what is done out of the way.

use super::Emission;
use crate::translate::assembler::{Assembler, Jump};

/// What code out of the way does.
#[derive(Clone, Copy)]
pub(super) enum ColdKind {
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
pub(super) struct Cold {
    /// The operation that it runs.
    pub(super) number: usize,
    pub(super) kind: ColdKind,
    /// What leads to it.
    pub(super) jumps: Vec<Jump>,
}

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
pub(super) struct Islands {
    /// Jumps without an island yet, oldest first, with their cold code.
    pending: Vec<(Jump, usize)>,
    /// Islands, with where they lead.
    built: Vec<(usize, usize)>,
    /// Room for more.
    rooms: Vec<Jump>,
}

impl Islands {
    /// None yet, but room for some.
    pub(super) fn new(code: &mut Assembler) -> Self {
        let rooms = (0..SPARE_ROOMS).map(|_| code.room_for_jump()).collect();
        Self { pending: Vec::new(), built: Vec::new(), rooms }
    }
}

impl Emission<'_> {
    /// The cold code of the operation in hand.
    fn slow_way(&mut self) -> usize {
        *self.current.get_or_insert_with(|| {
            let (number, kind) = (self.number, ColdKind::LastOperation);
            self.cold.push(Cold { number, kind, jumps: Vec::new() });
            self.cold.len() - 1
        })
    }

    /// What [`SCRATCH`] must be for [`Emission::slow_unless_found`] not to take the slow way.
    pub(in crate::translate) fn found(&self) -> i32 {
        i32::from(self.surroundings.fast_loop)
    }

    /// The operation in hand takes its slow way unless [`SCRATCH`] says that something was found.
    pub(in crate::translate) fn slow_unless_found(&mut self) {
        let cold = self.slow_way();
        self.cold_unless_found(cold);
    }

    /// Goes to cold code unless [`SCRATCH`] says that something was found.
    pub(super) fn cold_unless_found(&mut self, cold: usize) {
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
    pub(in crate::translate) fn slow_if(&mut self, code: u8) {
        let cold = self.slow_way();
        let jump = self.code.jump_forward_if(code);
        self.cold[cold].jumps.push(jump);
    }

    /// The operation in hand takes its slow way if [`SCRATCH`] is zero.
    pub(in crate::translate) fn slow_if_nothing(&mut self) {
        let cold = self.slow_way();
        let nothing = self.code.jump_near_if_rcx_zero();
        self.lead_to_cold(nothing, cold);
    }

    /// A short jump leads to cold code, by an island.
    pub(super) fn lead_to_cold(&mut self, jump: Jump, cold: usize) {
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

    /// Sees that jumps which still need an island will have one in reach after another `bytes`, which is
    /// the most that what is emitted next takes; a jump that does not reach is noticed where it lands.
    pub(in crate::translate) fn settle(&mut self, bytes: usize) {
        let Some((oldest, _)) = self.islands.pending.first() else { return };
        let islands = self.islands.pending.len() * ISLAND_JUMP_BYTES;
        if self.code.length() + bytes + OVER_BYTES + islands > oldest.end + NEAR_AHEAD {
            let over = self.code.jump_near();
            self.build_pending();
            self.islands.rooms = (0..SPARE_ROOMS).map(|_| self.code.room_for_jump()).collect();
            self.code.land(over);
        }
    }

    pub(super) fn build_pending(&mut self) {
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
}
