//! What an engine must offer so that another one can execute the instructions that it refuses.

use reprise_trace::cpu_state::CpuState;

use crate::engine::{Engine, EngineError};
use crate::ram::GuestRam;

/// An engine that can refuse an instruction and go on behind it.
pub trait Refusing: Engine {
    /// Whether the last [`crate::engine::Exit::Unsupported`] was given for one instruction, which the
    /// guest stands at and of which nothing has happened. [`Engine::cpu_state`] then gives the state in
    /// which it is to be executed.
    ///
    /// # Errors
    /// If the engine fails.
    fn has_refused(&mut self) -> Result<bool, EngineError>;

    /// Guest RAM, for whoever executes the refused instruction.
    fn ram(&self) -> &GuestRam;

    /// The board has answered an access of the refused instruction.
    fn count_access(&mut self);

    /// The refused instruction has been executed, or the fault that it raised delivered: that led from
    /// `before`, which [`Engine::cpu_state`] gave, to `after`. `retired` says whether it was an
    /// instruction that retired.
    ///
    /// # Errors
    /// If the engine does not take the state.
    fn go_on(
        &mut self,
        before: &CpuState,
        after: &CpuState,
        retired: bool,
    ) -> Result<(), EngineError>;
}
