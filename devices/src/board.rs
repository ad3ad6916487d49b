//! The board: where each device answers, and how the devices are wired together.

use alloc::vec::Vec;

use reprise_trace::logged::Logged;
use serde::{Deserialize, Serialize};

use crate::state::LoadError;
use crate::time::VirtualTime;

/// What a machine is built from. It goes into a recording's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardConfig {
    /// The end of guest RAM, in bytes: CMOS memory tells it to whoever asks.
    pub ram_bytes: u64,
    /// The wall clock at virtual time 0, in seconds since 1970-01-01 00:00:00 UTC.
    pub rtc_start_s: u64,
}

/// How the guest asked for the end of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerEvent {
    /// A reset, by whichever port.
    Reset,
    /// This byte was written to the debug-exit port.
    DebugExit(u8),
}

/// Everything that decides what the board does next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {}

/// Every device of the machine and the wires between them. A pure function of its calls.
#[derive(Clone, Debug)]
pub struct Board {}

impl Board {
    /// The board after power-on, at virtual time 0.
    pub fn new(_config: &BoardConfig) -> Self {
        Self {}
    }

    /// Carries every device to `now`, firing what is due in order.
    pub fn advance(&mut self, _now: VirtualTime) {}

    /// The earliest time at which a device will by itself change an interrupt line that the PIC
    /// would pass on; `None` for never.
    pub fn next_deadline(&self) -> Option<VirtualTime> {
        None
    }

    /// Answers IN; `size` is 1, 2 or 4 bytes. All ones where nothing answers.
    pub fn port_read(&mut self, _port: u16, size: u8, _now: VirtualTime) -> u32 {
        u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)))
    }

    /// Takes OUT; `size` is 1, 2 or 4 bytes.
    pub fn port_write(&mut self, _port: u16, _size: u8, _value: u32, _now: VirtualTime) {}

    /// Whether an access to this port reads time: under a clock that the host drives, the machine
    /// asks for the time first.
    pub fn port_depends_on_time(_port: u16) -> bool {
        false
    }

    /// Answers a load from an address without RAM; `size` is 1 to 16 bytes. Nothing is there.
    pub fn mmio_read(&mut self, _address: u64, size: u8, _now: VirtualTime) -> u128 {
        u128::MAX >> (128 - 8 * u32::from(size.clamp(1, 16)))
    }

    /// Takes a store to an address without RAM. Nothing is there.
    pub fn mmio_write(&mut self, _address: u64, _size: u8, _value: u128, _now: VirtualTime) {}

    /// The INTR line from the master PIC to the CPU.
    pub fn interrupt_pending(&self) -> bool {
        false
    }

    /// The CPU's interrupt-acknowledge cycle: the vector to deliver.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        7
    }

    /// How many console bytes the guest would take now.
    pub fn console_room(&self) -> usize {
        0
    }

    /// Bytes typed on the console arrive.
    pub fn console_input(&mut self, _bytes: Logged<Vec<u8>>, _now: VirtualTime) {}

    /// Whether the guest has written to the console since the last
    /// [`Board::take_console_output`].
    pub fn has_console_output(&self) -> bool {
        false
    }

    /// What the guest has written to the console since the last call.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// How the guest has asked for the end of the run, once.
    pub fn take_power_event(&mut self) -> Option<PowerEvent> {
        None
    }

    /// Everything that decides what the board does next.
    pub fn save(&self) -> BoardState {
        BoardState {}
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// If a device's state has a version that this build does not know; the board is then unchanged.
    pub fn load(&mut self, _state: &BoardState) -> Result<(), LoadError> {
        Ok(())
    }
}
