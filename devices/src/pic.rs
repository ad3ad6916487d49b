//! The interrupt controllers: two Intel 8259A, the second cascaded into input 2 of the first, as in
//! the IBM PC/AT. Datasheet: Intel 8259A (231468). The edge/level control registers (ELCR) at 4D0h
//! and 4D1h are those of the Intel PIIX (290550), which also say that ICW1's trigger bit is ignored.
//!
//! As the datasheet has it, a request has to stand until it is acknowledged: a falling input drops
//! it, in edge mode too. Reads of the status bits, acknowledgement and the cascade take no time.

#[cfg(test)]
pub(crate) mod tests;

use serde::{Deserialize, Serialize};

use crate::state::Device;

/// The master's input that the slave drives.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered: not the timer, keyboard, cascade, clock and FPU.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// The next initialization word that the data port expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    Mask,
    VectorBase,
    Cascade,
    Mode,
}

/// One 8259A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    /// Input levels.
    lines: u8,
    /// Requests not yet acknowledged.
    requested: u8,
    in_service: u8,
    mask: u8,
    /// Inputs that request for as long as they are high.
    level_triggered: u8,
    vector_base: u8,
    /// The input with the lowest priority; the one after it has the highest.
    lowest: u8,
    expects: Expects,
    single: bool,
    mode_word_follows: bool,
    automatic_end: bool,
    rotate_on_automatic_end: bool,
    special_fully_nested: bool,
    special_mask: bool,
    read_in_service: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Chip {
    /// As a PC's firmware leaves it, all inputs masked.
    fn new(vector_base: u8) -> Self {
        Self {
            lines: 0,
            requested: 0,
            in_service: 0,
            mask: 0xff,
            level_triggered: 0,
            vector_base,
            lowest: 7,
            expects: Expects::Mask,
            single: false,
            mode_word_follows: false,
            automatic_end: false,
            rotate_on_automatic_end: false,
            special_fully_nested: false,
            special_mask: false,
            read_in_service: false,
            poll: false,
        }
    }

    /// Inputs in order of priority, the highest in bit 0.
    fn by_priority(&self, inputs: u8) -> u8 {
        inputs.rotate_right(u32::from(self.lowest) + 1)
    }

    /// The highest-priority one of some inputs.
    fn highest(&self, inputs: u8) -> Option<u8> {
        let ordered = self.by_priority(inputs);
        (ordered != 0).then(|| (ordered.trailing_zeros() as u8 + self.lowest + 1) & 7)
    }

    /// What is in service and so keeps others waiting.
    fn blocking(&self) -> u8 {
        if self.special_mask { self.in_service & !self.mask } else { self.in_service }
    }

    /// The input for which this chip raises its INT output.
    fn request(&self) -> Option<u8> {
        if self.requested & !self.mask == 0 || self.expects != Expects::Mask {
            return None;
        }
        let request = self.highest(self.requested & !self.mask)?;
        let Some(served) = self.highest(self.blocking()) else {
            return Some(request);
        };
        // In the special fully nested mode a slave's interrupt may follow another of that slave.
        if self.special_fully_nested && request == CASCADE && served == CASCADE {
            return Some(request);
        }
        let rank = |input: u8| self.by_priority(1 << input);
        (rank(request) < rank(served)).then_some(request)
    }

    fn set_line(&mut self, input: u8, high: bool, level_triggered: bool) {
        let bit = 1 << input;
        if !high {
            self.lines &= !bit;
            self.requested &= !bit;
        } else if level_triggered || self.lines & bit == 0 {
            self.lines |= bit;
            self.requested |= bit;
        }
    }

    /// The acknowledge cycle: the input that is served from now on, if one still requests.
    fn acknowledge(&mut self) -> Option<u8> {
        let input = self.request()?;
        let bit = 1 << input;
        self.requested &= !bit | (self.lines & self.level_triggered);
        if !self.automatic_end {
            self.in_service |= bit;
        } else if self.rotate_on_automatic_end {
            self.lowest = input;
        }
        Some(input)
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if self.poll {
            self.poll = false;
            return self.acknowledge().map_or(0, |input| 0x80 | input);
        }
        match (data_port, self.read_in_service) {
            (true, _) => self.mask,
            (false, true) => self.in_service,
            (false, false) => self.requested,
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            self.operation_word_3(value);
        } else {
            self.operation_word_2(value);
        }
    }

    /// ICW1. An input has to fall and rise again before it requests.
    fn initialize(&mut self, value: u8) {
        let fresh = Self::new(self.vector_base);
        *self = Self {
            lines: self.lines,
            requested: self.lines & self.level_triggered,
            mask: 0,
            level_triggered: self.level_triggered,
            expects: Expects::VectorBase,
            single: value & 0x02 != 0,
            mode_word_follows: value & 0x01 != 0,
            ..fresh
        };
    }

    /// OCW2: ends of interrupts and rotation of priorities.
    fn operation_word_2(&mut self, value: u8) {
        let level = value & 7;
        let rotate = value & 0x80 != 0;
        match value >> 5 {
            0b000 => self.rotate_on_automatic_end = false,
            0b100 => self.rotate_on_automatic_end = true,
            0b001 | 0b101 => {
                if let Some(served) = self.highest(self.blocking()) {
                    self.end(served, rotate);
                }
            }
            0b011 | 0b111 => self.end(level, rotate),
            0b110 => self.lowest = level,
            _ => {}
        }
    }

    fn end(&mut self, input: u8, rotate: bool) {
        self.in_service &= !(1 << input);
        if rotate {
            self.lowest = input;
        }
    }

    /// OCW3: what reads show, polling and the special mask mode.
    fn operation_word_3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
        self.poll = value & 0x04 != 0;
    }

    fn write_data(&mut self, value: u8) {
        let mode = if self.mode_word_follows { Expects::Mode } else { Expects::Mask };
        self.expects = match self.expects {
            Expects::Mask => {
                self.mask = value;
                Expects::Mask
            }
            Expects::VectorBase => {
                self.vector_base = value & 0xf8;
                if self.single { mode } else { Expects::Cascade }
            }
            // The wiring is the board's, whatever the guest says.
            Expects::Cascade => mode,
            Expects::Mode => {
                self.special_fully_nested = value & 0x10 != 0;
                self.automatic_end = value & 0x02 != 0;
                Expects::Mask
            }
        };
    }

    fn write_elcr(&mut self, value: u8) {
        self.level_triggered = value;
        self.requested = (self.requested & !value) | (self.lines & value);
    }
}

/// Both controllers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pic {
    master: Chip,
    slave: Chip,
}

impl Device for Pic {
    const NAME: &'static str = "interrupt controller (8259A)";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        self.master.lowest < 8 && self.slave.lowest < 8
    }
}

impl Pic {
    /// As a PC's firmware leaves them: vectors 08h and 70h, all inputs masked.
    pub(crate) fn new() -> Self {
        Self { master: Chip::new(0x08), slave: Chip::new(0x70) }
    }

    /// The INTR line to the CPU.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.master.request().is_some()
    }

    /// The CPU's acknowledge cycle: the vector. If the request is gone, input 7 of the controller
    /// that was asked, which is then not in service.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.acknowledge() else {
            return self.master.vector_base | 7;
        };
        if input != CASCADE {
            return self.master.vector_base | input;
        }
        let vector = self.slave.vector_base | self.slave.acknowledge().unwrap_or(7);
        self.update_cascade();
        vector
    }

    /// Sets an interrupt line, 0 to 15.
    pub(crate) fn set_line(&mut self, irq: u8, high: bool) {
        let chip = if irq < 8 { &mut self.master } else { &mut self.slave };
        let input = irq & 7;
        chip.set_line(input, high, chip.level_triggered & (1 << input) != 0);
        if irq >= 8 {
            self.update_cascade();
        }
    }

    /// Whether the CPU would be interrupted by this line's rise, had it to take no other first.
    pub(crate) fn passes_on(&self, irq: u8) -> bool {
        let (chip, input) = if irq < 8 { (&self.master, irq) } else { (&self.slave, irq & 7) };
        if chip.mask & (1 << input) != 0 || chip.requested & (1 << input) != 0 {
            return false;
        }
        let mut raised = self.clone();
        // An input that is high already has to fall before it rises.
        raised.set_line(irq, false);
        raised.set_line(irq, true);
        let from_slave = irq >= 8 && raised.slave.request() == Some(input);
        let master_input = if irq < 8 { input } else { CASCADE };
        raised.master.request() == Some(master_input) && (irq < 8 || from_slave)
    }

    /// The slave's INT output drives the cascade input, which just follows it.
    fn update_cascade(&mut self) {
        let high = self.slave.request().is_some();
        self.master.set_line(CASCADE, high, true);
    }

    pub(crate) fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0),
            0xa0 | 0xa1 => self.slave.read(port & 1 != 0),
            0x4d0 => self.master.level_triggered,
            _ => self.slave.level_triggered,
        };
        self.update_cascade();
        value
    }

    pub(crate) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.write_elcr(value & ELCR_WRITABLE[0]),
            _ => self.slave.write_elcr(value & ELCR_WRITABLE[1]),
        }
        self.update_cascade();
    }
}
