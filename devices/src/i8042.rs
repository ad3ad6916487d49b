//! The keyboard controller: an Intel 8042 with IBM's PC/AT program, described in the IBM PC/AT
//! Technical Reference (1502494). No keyboard is plugged in, and there is no auxiliary port.
//!
//! Bytes for the keyboard come back as FEh with the timeout flag, which is what the program says
//! when nobody answers, but here without the wait. The commands that address an auxiliary port
//! answer like a port that fails its test, so that a guest which probes for a mouse has done at once.
//! What remains is what a guest needs: a probe that ends soon, the A20 gate and the reset line. (A20
//! is always open: the gate's bit only reads back.)

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::state::Device;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_LOCKED: u8 = 1 << 4;
const STATUS_TIMEOUT: u8 = 1 << 6;

const MODE_INTERRUPT: u8 = 1 << 0;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_OFF: u8 = 1 << 4;
const MODE_AUXILIARY_OFF: u8 = 1 << 5;
const MODE_TRANSLATE: u8 = 1 << 6;

/// Low resets the CPU.
const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

const READ_INPUT_PORT: u8 = 0xc0;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const ECHO_AS_KEYBOARD: u8 = 0xd2;
const ECHO_AS_AUXILIARY: u8 = 0xd3;
const WRITE_AUXILIARY: u8 = 0xd4;
const AUXILIARY_OFF: u8 = 0xa7;
const AUXILIARY_ON: u8 = 0xa8;
const TEST_AUXILIARY: u8 = 0xa9;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD_LINES: u8 = 0xab;
const KEYBOARD_OFF: u8 = 0xad;
const KEYBOARD_ON: u8 = 0xae;
const READ_TEST_INPUTS: u8 = 0xe0;

const CONTROLLER_PASSED: u8 = 0x55;
const LINES_PASSED: u8 = 0x00;
const CLOCK_LINE_LOW: u8 = 0x01;
const RESEND: u8 = 0xfe;

/// The 8042.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyboardController {
    /// The byte that the data port gives, read or not.
    output: u8,
    output_full: bool,
    timed_out: bool,
    last_was_command: bool,
    /// A command that takes its next byte from the data port.
    pending: Option<u8>,
    /// The controller's memory; its first byte is the mode.
    memory: [u8; 32],
    output_port: u8,
}

impl Device for KeyboardController {
    const NAME: &'static str = "keyboard controller (8042)";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        true
    }
}

impl KeyboardController {
    /// As a PC's firmware leaves it.
    pub(crate) fn new() -> Self {
        let mut memory = [0; 32];
        memory[0] = MODE_INTERRUPT | MODE_SYSTEM | MODE_AUXILIARY_OFF | MODE_TRANSLATE;
        Self {
            output: 0,
            output_full: false,
            timed_out: false,
            last_was_command: false,
            pending: None,
            memory,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
        }
    }

    /// The pin that drives interrupt line 1.
    pub(crate) fn interrupt(&self) -> bool {
        self.output_full && self.memory[0] & MODE_INTERRUPT != 0
    }

    fn answer(&mut self, value: u8) {
        self.output = value;
        self.output_full = true;
        self.timed_out = false;
    }

    pub(crate) fn read_data(&mut self) -> u8 {
        self.output_full = false;
        self.timed_out = false;
        self.output
    }

    pub(crate) fn read_status(&self) -> u8 {
        let flags = [
            (self.output_full, STATUS_OUTPUT_FULL),
            (self.memory[0] & MODE_SYSTEM != 0, STATUS_SYSTEM),
            (self.last_was_command, STATUS_LAST_WAS_COMMAND),
            (self.timed_out, STATUS_TIMEOUT),
        ];
        let raised = flags.iter().filter(|(raised, _)| *raised);
        raised.fold(STATUS_NOT_LOCKED, |status, (_, bit)| status | bit)
    }

    /// Writes the command port; returns whether that resets the machine.
    pub(crate) fn write_command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.pending = None;
        match command {
            0x00..=0x3f => self.answer(self.memory[usize::from(command & 0x1f)]),
            0x40..=0x7f
            | WRITE_OUTPUT_PORT
            | ECHO_AS_KEYBOARD
            | ECHO_AS_AUXILIARY
            | WRITE_AUXILIARY => self.pending = Some(command),
            AUXILIARY_OFF => self.memory[0] |= MODE_AUXILIARY_OFF,
            AUXILIARY_ON => self.memory[0] &= !MODE_AUXILIARY_OFF,
            TEST_AUXILIARY => self.answer(CLOCK_LINE_LOW),
            TEST_CONTROLLER => {
                self.memory[0] |= MODE_SYSTEM;
                self.answer(CONTROLLER_PASSED);
            }
            TEST_KEYBOARD_LINES => self.answer(LINES_PASSED),
            KEYBOARD_OFF => self.memory[0] |= MODE_KEYBOARD_OFF,
            KEYBOARD_ON => self.memory[0] &= !MODE_KEYBOARD_OFF,
            READ_INPUT_PORT => self.answer(0x80),
            READ_OUTPUT_PORT => {
                let full = if self.output_full { 1 << 4 } else { 0 };
                self.answer(self.output_port | full);
            }
            READ_TEST_INPUTS => self.answer(0),
            // Pulses low those of the output port's lowest four lines whose bits are zero.
            0xf0..=0xff => return command & OUTPUT_NOT_RESET == 0,
            _ => {}
        }
        false
    }

    /// Writes the data port; returns whether that resets the machine.
    pub(crate) fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match self.pending.take() {
            Some(command @ 0x40..=0x7f) => self.memory[usize::from(command & 0x1f)] = value,
            Some(WRITE_OUTPUT_PORT) => {
                self.output_port = value;
                return value & OUTPUT_NOT_RESET == 0;
            }
            // Without an auxiliary port, an echo that does not say that it comes from there.
            Some(ECHO_AS_KEYBOARD | ECHO_AS_AUXILIARY) => self.answer(value),
            // For the keyboard, or for an auxiliary device: nobody answers. Sending turns the
            // keyboard on.
            other => {
                if other.is_none() {
                    self.memory[0] &= !MODE_KEYBOARD_OFF;
                }
                self.answer(RESEND);
                self.timed_out = true;
            }
        }
        false
    }
}
