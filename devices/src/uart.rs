//! The serial port: a National Semiconductor PC16550D (datasheet TL/C/8652) at 3F8h on interrupt
//! line 4, clocked with 1.8432 MHz.
//!
//! At its other end hangs a terminal that is always ready. A byte written is transmitted at once, so
//! the transmitter is always empty; bytes received come in as the board hands them over. Only the
//! receive timeout takes time. Word length and parity are kept for the guest, but every byte goes
//! through whole. The interrupt pin reaches the interrupt controller through OUT2, as on a PC.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::state::Device;
use crate::time::NS_PER_S;

/// Bytes that the receive FIFO holds.
const FIFO_BYTES: usize = 16;
/// The crystal's frequency over the baud generator's fixed sixteenth.
const BAUD_BASE: u64 = 115_200;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
/// Reads as interrupt identification, writes FIFO control.
const IDENTIFICATION_AND_FIFO: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
const MODEM_STATUS: u8 = 6;

const ENABLE_RECEIVED: u8 = 1 << 0;
const ENABLE_TRANSMITTER_EMPTY: u8 = 1 << 1;
const ENABLE_LINE_STATUS: u8 = 1 << 2;
const ENABLE_MODEM_STATUS: u8 = 1 << 3;

const NO_INTERRUPT: u8 = 0b0001;
const BY_MODEM_STATUS: u8 = 0b0000;
const BY_TRANSMITTER_EMPTY: u8 = 0b0010;
const BY_RECEIVED: u8 = 0b0100;
const BY_LINE_STATUS: u8 = 0b0110;
const BY_TIMEOUT: u8 = 0b1100;
const FIFOS_ENABLED: u8 = 0b1100_0000;

const DIVISOR_LATCH: u8 = 1 << 7;

const DTR: u8 = 1 << 0;
const RTS: u8 = 1 << 1;
const OUT1: u8 = 1 << 2;
const OUT2: u8 = 1 << 3;
const LOOPBACK: u8 = 1 << 4;

const DATA_READY: u8 = 1 << 0;
const OVERRUN: u8 = 1 << 1;
const TRANSMITTER_EMPTY: u8 = (1 << 5) | (1 << 6);

const CTS: u8 = 1 << 4;
const DSR: u8 = 1 << 5;
const RING: u8 = 1 << 6;
const CARRIER: u8 = 1 << 7;

/// Looks in a row after which a guest counts as one that polls for input.
const POLLING_LOOKS: u8 = 16;

/// What a write did besides changing registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// The byte left the machine.
    pub(crate) transmitted: bool,
    /// The interrupt pin was low for an instant.
    pub(crate) interrupt_dipped: bool,
}

/// The 16550.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Uart {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    divisor: u16,
    scratch: u8,
    fifos_enabled: bool,
    /// Bytes at which the receive FIFO interrupts.
    trigger_bytes: u8,
    received: [u8; FIFO_BYTES],
    /// Where the oldest byte is.
    received_start: u8,
    received_bytes: u8,
    overrun: bool,
    /// The transmitter has become empty, and nobody has looked.
    transmitter_empty_pending: bool,
    /// The receive FIFO was left alone for too long.
    timed_out: bool,
    /// When it will have been, in nanoseconds.
    timeout_ns: Option<u64>,
    /// Modem status bits 0 to 3.
    modem_changes: u8,
    /// How often in a row the guest has looked for a byte, found none, and done nothing else here.
    idle_looks: u8,
}

impl Device for Uart {
    const NAME: &'static str = "serial port (16550)";
    const STATE_VERSION: u32 = 1;

    fn is_possible(&self) -> bool {
        usize::from(self.received_start) < FIFO_BYTES
            && usize::from(self.received_bytes) <= self.receive_capacity()
            && self.idle_looks <= POLLING_LOOKS
    }
}

impl Uart {
    /// After reset, set to 9600 baud.
    pub(crate) fn new() -> Self {
        Self {
            interrupt_enable: 0,
            line_control: 0,
            modem_control: 0,
            divisor: 12,
            scratch: 0,
            fifos_enabled: false,
            trigger_bytes: 1,
            received: [0; FIFO_BYTES],
            received_start: 0,
            received_bytes: 0,
            overrun: false,
            transmitter_empty_pending: false,
            timed_out: false,
            timeout_ns: None,
            modem_changes: 0,
            idle_looks: 0,
        }
    }

    fn receive_capacity(&self) -> usize {
        if self.fifos_enabled { FIFO_BYTES } else { 1 }
    }

    fn in_loopback(&self) -> bool {
        self.modem_control & LOOPBACK != 0
    }

    /// How many bytes the guest would take: none before it has shown that it wants any, with receive
    /// interrupts that reach it, or by raising RTS and then doing nothing but look for a byte.
    /// (Linux enables all interrupts for an instant when it looks for a port, and raises RTS before
    /// it throws away what came in.)
    pub(crate) fn room(&self) -> usize {
        let interrupts = self.interrupt_enable & ENABLE_RECEIVED != 0 && self.drives_interrupt();
        let polls = self.modem_control & RTS != 0 && self.idle_looks >= POLLING_LOOKS;
        let listens = interrupts || polls;
        if !listens || self.in_loopback() {
            return 0;
        }
        self.receive_capacity() - usize::from(self.received_bytes)
    }

    /// Bytes come in from the terminal. Those for which there is no room are lost.
    pub(crate) fn receive(&mut self, bytes: &[u8], now_ns: u64) {
        if !self.in_loopback() {
            for &byte in bytes {
                self.push_received(byte);
            }
            self.restart_timeout(now_ns);
        }
    }

    fn push_received(&mut self, byte: u8) {
        let capacity = self.receive_capacity();
        let (start, count) = (usize::from(self.received_start), usize::from(self.received_bytes));
        if count < capacity {
            self.received[(start + count) % FIFO_BYTES] = byte;
            self.received_bytes += 1;
        } else {
            // A full FIFO keeps what it has; without one the new byte takes the old one's place.
            self.overrun = true;
            if !self.fifos_enabled {
                self.received[start] = byte;
            }
        }
    }

    fn clear_received(&mut self) {
        self.received = [0; FIFO_BYTES];
        self.received_start = 0;
        self.received_bytes = 0;
        self.timed_out = false;
        self.timeout_ns = None;
    }

    /// The timeout is four characters from the last byte that came or was read.
    fn restart_timeout(&mut self, now_ns: u64) {
        let waits = self.fifos_enabled && self.received_bytes > 0;
        self.timeout_ns = waits.then(|| now_ns.saturating_add(4 * self.character_ns()));
    }

    fn character_ns(&self) -> u64 {
        let data_bits = 5 + u64::from(self.line_control & 0b11);
        let stop_bits = 1 + u64::from(self.line_control >> 2 & 1);
        let parity_bits = u64::from(self.line_control >> 3 & 1);
        let divisor = if self.divisor == 0 { 0x1_0000 } else { u64::from(self.divisor) };
        (1 + data_bits + parity_bits + stop_bits) * divisor * NS_PER_S / BAUD_BASE
    }

    /// Lets time pass.
    #[inline]
    pub(crate) fn advance(&mut self, now_ns: u64) {
        if self.timeout_ns.is_some_and(|timeout_ns| timeout_ns <= now_ns) {
            self.timeout_ns = None;
            self.timed_out = true;
        }
    }

    /// When the interrupt pin next rises by itself, in nanoseconds.
    #[inline]
    pub(crate) fn next_rise_ns(&self) -> Option<u64> {
        let timeout_ns = self.timeout_ns?;
        let reaches_pin = self.interrupt_enable & ENABLE_RECEIVED != 0 && self.drives_interrupt();
        (reaches_pin && !self.interrupt()).then_some(timeout_ns)
    }

    fn drives_interrupt(&self) -> bool {
        self.modem_control & (OUT2 | LOOPBACK) == OUT2
    }

    /// The interrupt pin, behind OUT2.
    #[inline]
    pub(crate) fn interrupt(&self) -> bool {
        self.drives_interrupt() && self.cause() != NO_INTERRUPT
    }

    /// The interrupt with the highest priority.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(ENABLE_LINE_STATUS) && self.overrun {
            BY_LINE_STATUS
        } else if enabled(ENABLE_RECEIVED) && self.received_bytes >= self.trigger_bytes {
            BY_RECEIVED
        } else if enabled(ENABLE_RECEIVED) && self.timed_out {
            BY_TIMEOUT
        } else if enabled(ENABLE_TRANSMITTER_EMPTY) && self.transmitter_empty_pending {
            BY_TRANSMITTER_EMPTY
        } else if enabled(ENABLE_MODEM_STATUS) && self.modem_changes != 0 {
            BY_MODEM_STATUS
        } else {
            NO_INTERRUPT
        }
    }

    /// Modem status bits 4 to 7: the terminal's lines, or in loopback the port's own.
    fn modem_lines(&self) -> u8 {
        if !self.in_loopback() {
            return CTS | DSR | CARRIER;
        }
        let looped = [(RTS, CTS), (DTR, DSR), (OUT1, RING), (OUT2, CARRIER)];
        let raised = |&(output, _): &(u8, u8)| self.modem_control & output != 0;
        looped.iter().filter(|pair| raised(pair)).fold(0, |lines, (_, input)| lines | input)
    }

    fn divisor_latch(&self) -> bool {
        self.line_control & DIVISOR_LATCH != 0
    }

    /// Reads register 0 to 7.
    #[inline]
    pub(crate) fn read(&mut self, register: u8, now_ns: u64) -> u8 {
        self.advance(now_ns);
        if register != LINE_STATUS && register != DATA {
            self.idle_looks = 0;
        }
        match register {
            LINE_STATUS => self.read_line_status(),
            DATA if self.divisor_latch() => self.divisor as u8,
            DATA => self.read_data(now_ns),
            INTERRUPT_ENABLE if self.divisor_latch() => (self.divisor >> 8) as u8,
            INTERRUPT_ENABLE => self.interrupt_enable,
            IDENTIFICATION_AND_FIFO => self.read_identification(),
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            MODEM_STATUS => {
                let changes = core::mem::take(&mut self.modem_changes);
                self.modem_lines() | changes
            }
            _ => self.scratch,
        }
    }

    fn read_line_status(&mut self) -> u8 {
        let ready = if self.received_bytes > 0 { DATA_READY } else { 0 };
        if ready == 0 {
            self.idle_looks = (self.idle_looks + 1).min(POLLING_LOOKS);
        }
        let overrun = if core::mem::take(&mut self.overrun) { OVERRUN } else { 0 };
        TRANSMITTER_EMPTY | ready | overrun
    }

    fn read_data(&mut self, now_ns: u64) -> u8 {
        let byte = self.received[usize::from(self.received_start)];
        if self.received_bytes > 0 {
            self.received_bytes -= 1;
            if self.fifos_enabled {
                self.received_start = (self.received_start + 1) % FIFO_BYTES as u8;
            }
            self.timed_out = false;
            self.restart_timeout(now_ns);
        }
        byte
    }

    fn read_identification(&mut self) -> u8 {
        let cause = self.cause();
        if cause == BY_TRANSMITTER_EMPTY {
            self.transmitter_empty_pending = false;
        }
        cause | if self.fifos_enabled { FIFOS_ENABLED } else { 0 }
    }

    /// Writes register 0 to 7.
    #[inline]
    pub(crate) fn write(&mut self, register: u8, value: u8, now_ns: u64) -> Written {
        self.advance(now_ns);
        self.idle_looks = 0;
        match register {
            DATA if !self.divisor_latch() => return self.write_data(value, now_ns),
            DATA => self.divisor = (self.divisor & 0xff00) | u16::from(value),
            INTERRUPT_ENABLE if self.divisor_latch() => {
                self.divisor = (self.divisor & 0x00ff) | (u16::from(value) << 8);
            }
            INTERRUPT_ENABLE => self.write_interrupt_enable(value),
            IDENTIFICATION_AND_FIFO => self.write_fifo_control(value),
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.write_modem_control(value),
            LINE_STATUS | MODEM_STATUS => {}
            _ => self.scratch = value,
        }
        Written::default()
    }

    /// The byte fills the transmitter and leaves it again at once: the interrupt goes and comes.
    fn write_data(&mut self, value: u8, now_ns: u64) -> Written {
        let was_high = self.interrupt();
        self.transmitter_empty_pending = false;
        let interrupt_dipped = was_high && !self.interrupt();
        self.transmitter_empty_pending = true;
        let transmitted = !self.in_loopback();
        if !transmitted {
            self.push_received(value);
            self.restart_timeout(now_ns);
        }
        Written { transmitted, interrupt_dipped }
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        let risen = value & !self.interrupt_enable;
        if risen & ENABLE_TRANSMITTER_EMPTY != 0 {
            self.transmitter_empty_pending = true;
        }
        self.interrupt_enable = value & 0x0f;
    }

    fn write_fifo_control(&mut self, value: u8) {
        let enable = value & 0x01 != 0;
        if enable != self.fifos_enabled || value & 0x02 != 0 {
            self.clear_received();
        }
        self.fifos_enabled = enable;
        self.trigger_bytes = if enable { [1, 4, 8, 14][usize::from(value >> 6)] } else { 1 };
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_lines();
        self.modem_control = value & 0x1f;
        let after = self.modem_lines();
        let changed = (before ^ after) & (CTS | DSR | CARRIER);
        // Of the ring indicator only the end is noticed.
        let rung = before & !after & RING;
        self.modem_changes |= (changed | rung) >> 4;
    }
}
