//! A machine that is compared with another: moved to an instruction, let in what enters there, and looked
//! at.

use std::collections::BTreeSet;

use reprise_devices::board::BoardState;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_machine::stepping::{Standing, Surroundings};
use reprise_replay::kept_by_software;
use reprise_trace::checkpoint::{HiddenState, PAGE_BYTES};
use reprise_trace::cpu_state::CpuState;

use crate::image::Page;

/// How much of two machines has to be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// CPU and RAM: what the guest's programs can see at once.
    Visible,
    /// That, and all that decides what they will see: devices, virtual time, TLB, and console output.
    Everything,
}

/// A machine before an instruction, RAM apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Instructions retired before, since the machine started.
    pub instructions: u64,
    /// Ticks of its recording's clock since the machine started.
    pub tick: u64,
    /// The CPU.
    pub cpu: CpuState,
    /// The board.
    pub devices: BoardState,
    /// What the engine keeps beside the CPU state and its clock; `None` amid an instruction.
    pub hidden: Option<HiddenState>,
    /// Time, output and counters.
    pub surroundings: Surroundings,
    /// Whether the run is over here.
    pub over: bool,
}

impl Look {
    /// Whether both are the same, as far as `depth` goes.
    pub fn is_like(&self, other: &Self, depth: Depth) -> bool {
        let visible = self.instructions == other.instructions
            && self.cpu == other.cpu
            && self.over == other.over;
        match depth {
            Depth::Visible => visible,
            Depth::Everything => visible && self == other,
        }
    }
}

/// A replaying machine, whatever its engine.
pub(crate) trait Replica {
    fn advance(&mut self, instructions: u64) -> Result<Option<Outcome>, MachineError>;
    fn advance_to_tick(&mut self, tick: u64) -> Result<Option<Outcome>, MachineError>;
    fn enter(&mut self) -> Result<Option<Outcome>, MachineError>;
    /// Instructions before it, as far as it knows.
    fn instructions(&mut self) -> u64;
    fn tick(&mut self) -> u64;
    fn look(&mut self) -> Result<Look, EngineError>;
    /// The CPU alone.
    fn cpu(&mut self) -> Result<CpuState, EngineError>;
    /// Adds the pages of RAM that may have been written since this was last asked.
    fn add_changed_pages(&mut self, pages: &mut BTreeSet<u64>);
    fn page(&mut self, address: u64) -> Page;
    /// Everything but RAM, where the machine can be gone on from.
    fn standing(&mut self) -> Result<Option<Standing>, EngineError>;
    /// It was taken up where it stood amid a stretch.
    fn go_on_amid_stretch(&mut self);
}

impl<E: Engine> Replica for Machine<E, Replaying> {
    fn advance(&mut self, instructions: u64) -> Result<Option<Outcome>, MachineError> {
        self.advance_to_instruction(instructions)
    }

    fn advance_to_tick(&mut self, tick: u64) -> Result<Option<Outcome>, MachineError> {
        self.advance_to(tick)
    }

    fn enter(&mut self) -> Result<Option<Outcome>, MachineError> {
        Machine::enter(self)
    }

    fn instructions(&mut self) -> u64 {
        // Sides are made of engines that know.
        self.engine().instructions().unwrap_or_else(|| self.engine().tick())
    }

    fn tick(&mut self) -> u64 {
        self.engine().tick()
    }

    fn look(&mut self) -> Result<Look, EngineError> {
        // Amid a tick an engine of another clock saves its state only where it was told to pause.
        let here = self.engine().instructions();
        self.engine().pause_at(here);
        let saved = self.engine().save();
        self.engine().pause_at(None);
        let hidden = saved?.map(|saved| kept_by_software(saved.hidden));
        Ok(Look {
            instructions: Replica::instructions(self),
            tick: self.engine().tick(),
            cpu: self.engine().cpu_state()?,
            devices: self.board().save(),
            hidden,
            surroundings: self.surroundings(),
            over: false,
        })
    }

    fn cpu(&mut self) -> Result<CpuState, EngineError> {
        self.engine().cpu_state()
    }

    fn add_changed_pages(&mut self, pages: &mut BTreeSet<u64>) {
        let mut add = |start: u64, piece: &[u8]| {
            pages.extend((start..start + piece.len() as u64).step_by(PAGE_BYTES));
        };
        self.engine().start_capture(&mut add);
        while !self.engine().continue_capture(usize::MAX, &mut add) {}
    }

    fn page(&mut self, address: u64) -> Page {
        let mut page = Box::new([0; PAGE_BYTES]);
        self.engine().read_ram(address, &mut page[..]);
        page
    }

    fn standing(&mut self) -> Result<Option<Standing>, EngineError> {
        Machine::standing(self)
    }

    fn go_on_amid_stretch(&mut self) {
        Machine::go_on_amid_stretch(self);
    }
}

/// A replica, where it is in its run, and whether that is over.
pub(crate) struct Runner {
    replica: Box<dyn Replica>,
    /// Instructions of the run before those that the replica counts; wraps.
    before: u64,
    over: Option<Over>,
}

/// How a replay ended.
#[derive(Clone, Debug)]
pub(crate) struct Over {
    /// In words.
    pub(crate) text: String,
    /// The replay is not what was recorded.
    pub(crate) diverged: bool,
}

impl From<Outcome> for Over {
    fn from(outcome: Outcome) -> Self {
        let (text, diverged) = match outcome.conclusion {
            Conclusion::Ended(ending) => (format!("{ending}"), false),
            Conclusion::CutShort { .. } => ("its log goes no further".to_owned(), false),
            Conclusion::TargetReached => ("it stands".to_owned(), false),
            Conclusion::HandedOver(to) => {
                (format!("another engine goes on ({}, clock {})", to.engine, to.clock), false)
            }
            Conclusion::Diverged(divergence) => (divergence.to_string(), true),
        };
        Self { text, diverged }
    }
}

impl Runner {
    /// A replica where its replay begins.
    pub(crate) fn new(replica: Box<dyn Replica>) -> Self {
        Self { replica, before: 0, over: None }
    }

    /// A replica from where another stood, so many instructions into the run.
    pub(crate) fn resumed(
        mut replica: Box<dyn Replica>,
        instructions: u64,
        amid_stretch: bool,
    ) -> Self {
        if amid_stretch {
            replica.go_on_amid_stretch();
        }
        // Behind a hand-over the state alone does not say how many they are.
        let before = instructions.wrapping_sub(replica.instructions());
        Self { replica, before, over: None }
    }

    pub(crate) fn over(&self) -> Option<&Over> {
        self.over.as_ref()
    }

    /// Instructions retired before it.
    pub(crate) fn instructions(&mut self) -> u64 {
        self.before.wrapping_add(self.replica.instructions())
    }

    /// Its tick, which is its recording's affair.
    pub(crate) fn tick(&mut self) -> u64 {
        self.replica.tick()
    }

    pub(crate) fn advance(&mut self, instructions: u64) -> Result<(), MachineError> {
        if self.over.is_none() && self.instructions() < instructions {
            let target = instructions.wrapping_sub(self.before);
            self.over = self.replica.advance(target)?.map(Over::from);
        }
        Ok(())
    }

    pub(crate) fn advance_to_tick(&mut self, tick: u64) -> Result<(), MachineError> {
        if self.over.is_none() && self.replica.tick() < tick {
            self.over = self.replica.advance_to_tick(tick)?.map(Over::from);
        }
        Ok(())
    }

    pub(crate) fn enter(&mut self) -> Result<(), MachineError> {
        if self.over.is_none() {
            self.over = self.replica.enter()?.map(Over::from);
        }
        Ok(())
    }

    pub(crate) fn look(&mut self) -> Result<Look, EngineError> {
        let (instructions, over) = (self.instructions(), self.over.is_some());
        Ok(Look { instructions, over, ..self.replica.look()? })
    }

    pub(crate) fn cpu(&mut self) -> Result<CpuState, EngineError> {
        self.replica.cpu()
    }

    pub(crate) fn add_changed_pages(&mut self, pages: &mut BTreeSet<u64>) {
        self.replica.add_changed_pages(pages);
    }

    pub(crate) fn page(&mut self, address: u64) -> Page {
        self.replica.page(address)
    }

    pub(crate) fn standing(&mut self) -> Result<Option<Standing>, EngineError> {
        if self.over.is_some() { Ok(None) } else { self.replica.standing() }
    }
}
