//! The board: where each device answers, and how the devices are wired together.
//!
//! It is a PC/AT without most of its parts: interrupt controllers, timer, clock, keyboard controller
//! and one serial port. Where nothing answers, reads give all ones and writes do nothing; that goes
//! for PCI configuration too.
//!
//! Devices do not follow time step by step. They compute what passed since they were last looked at,
//! and the board looks at them when an interrupt that the CPU could see is due
//! ([`Board::next_deadline`]) or the guest accesses one. Whether time comes in one leap or in many
//! steps makes no difference that a guest or a saved state could show.

#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use reprise_trace::logged::Logged;
use serde::{Deserialize, Serialize};

use crate::debug_exit;
use crate::i8042::KeyboardController;
use crate::pic::Pic;
use crate::pit::Pit;
use crate::reset::{self, ResetPorts};
use crate::rtc::Rtc;
use crate::state::{Device, LoadError, Saved};
use crate::time::VirtualTime;
use crate::uart::Uart;

const TIMER_IRQ: u8 = 0;
const KEYBOARD_IRQ: u8 = 1;
const SERIAL_IRQ: u8 = 4;
const CLOCK_IRQ: u8 = 8;

/// Time goes no further: 292 years, beyond what any recording says that is not forged.
const END_OF_TIME_NS: u64 = i64::MAX as u64;
const NEVER_NS: u64 = u64::MAX;

/// The version of [`BoardState`] apart from the devices' own.
const STATE_VERSION: u32 = 1;

/// What a read gives where nothing answers.
const ABSENT: u8 = 0xff;

/// What answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Nothing,
    /// Either interrupt controller, or edge/level control.
    Interrupts,
    /// The timer's counter 0, 1 or 2.
    Counter(usize),
    CounterControl,
    PortB,
    KeyboardData,
    KeyboardCommand,
    ClockIndex,
    ClockData,
    PortA,
    DebugExit,
    /// The serial port's register 0 to 7.
    Serial(u8),
    ResetControl,
}

/// The map of the I/O ports.
#[inline]
fn part_at(port: u16) -> Part {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Part::Interrupts,
        0x40..=0x42 => Part::Counter(usize::from(port - 0x40)),
        0x43 => Part::CounterControl,
        0x60 => Part::KeyboardData,
        0x61 => Part::PortB,
        0x64 => Part::KeyboardCommand,
        0x70 => Part::ClockIndex,
        0x71 => Part::ClockData,
        reset::PORT_A => Part::PortA,
        debug_exit::PORT => Part::DebugExit,
        0x3f8..=0x3ff => Part::Serial((port & 7) as u8),
        reset::RESET_CONTROL => Part::ResetControl,
        _ => Part::Nothing,
    }
}

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
pub struct BoardState {
    version: u32,
    now_ns: u64,
    power_event: Option<PowerEvent>,
    pic: Saved<Pic>,
    pit: Saved<Pit>,
    rtc: Saved<Rtc>,
    uart: Saved<Uart>,
    keyboard: Saved<KeyboardController>,
    reset: Saved<ResetPorts>,
}

/// Every device of the machine and the wires between them. A pure function of its calls.
#[derive(Clone, Debug)]
pub struct Board {
    now_ns: u64,
    /// See [`Board::next_deadline`].
    deadline_ns: u64,
    /// The serial port's interrupt pin as the interrupt controller has seen it.
    serial_interrupt: bool,
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    uart: Uart,
    keyboard: KeyboardController,
    reset: ResetPorts,
    power_event: Option<PowerEvent>,
    console_output: Vec<u8>,
}

impl Board {
    /// The board after power-on, at virtual time 0.
    pub fn new(config: &BoardConfig) -> Self {
        let mut board = Self {
            now_ns: 0,
            deadline_ns: NEVER_NS,
            serial_interrupt: false,
            pic: Pic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(config.rtc_start_s, config.ram_bytes),
            uart: Uart::new(),
            keyboard: KeyboardController::new(),
            reset: ResetPorts::new(),
            power_event: None,
            console_output: Vec::new(),
        };
        board.update_deadline();
        board
    }

    /// Carries every device to `now`, firing what is due in order. Time never goes back: an earlier
    /// `now` counts as the latest.
    #[inline]
    pub fn advance(&mut self, now: VirtualTime) {
        self.now_ns = now.ns.min(END_OF_TIME_NS).max(self.now_ns);
        if self.now_ns >= self.deadline_ns {
            self.catch_up();
        }
    }

    /// The earliest time at which a device will by itself raise an interrupt line that the
    /// interrupt controllers pass on to the CPU; `None` for never. Until then nothing happens that
    /// the CPU could see without an access to the board. In the future, after
    /// [`Board::advance`] to the present.
    #[inline]
    pub fn next_deadline(&self) -> Option<VirtualTime> {
        (self.deadline_ns != NEVER_NS).then(|| VirtualTime::from_ns(self.deadline_ns))
    }

    /// Brings every device to the present.
    fn catch_up(&mut self) {
        if self.pit.advance(self.now_ns) {
            self.raise_timer_interrupt();
        }
        self.rtc.advance(self.now_ns);
        self.pic.set_line(CLOCK_IRQ, self.rtc.interrupt());
        self.uart.advance(self.now_ns);
        self.drive_serial_interrupt();
        self.update_deadline();
    }

    /// The timer's output does not take back the request when it falls, as it would on a PC: a host
    /// that looks at the clock too late would lose a tick of a square wave every other time.
    fn raise_timer_interrupt(&mut self) {
        self.pic.set_line(TIMER_IRQ, false);
        self.pic.set_line(TIMER_IRQ, true);
    }

    fn drive_serial_interrupt(&mut self) {
        self.serial_interrupt = self.uart.interrupt();
        self.pic.set_line(SERIAL_IRQ, self.serial_interrupt);
    }

    fn update_deadline(&mut self) {
        let mut deadline_ns = NEVER_NS;
        let mut consider = |irq, rise_ns: Option<u64>| {
            if let Some(rise_ns) = rise_ns.filter(|&ns| ns < deadline_ns && ns <= END_OF_TIME_NS)
                && self.pic.passes_on(irq)
            {
                deadline_ns = rise_ns;
            }
        };
        consider(TIMER_IRQ, self.pit.next_rise_ns());
        consider(CLOCK_IRQ, self.rtc.next_rise_ns());
        consider(SERIAL_IRQ, self.uart.next_rise_ns());
        self.deadline_ns = deadline_ns;
    }

    /// Whether an access to this port reads time: under a clock that the host drives, the machine
    /// asks for the time first.
    pub fn port_depends_on_time(port: u16) -> bool {
        use Part::{ClockData, Counter, CounterControl, PortB};
        matches!(part_at(port), Counter(_) | CounterControl | PortB | ClockData)
    }

    /// Answers IN; `size` is 1, 2 or 4 bytes. All ones where nothing answers.
    #[inline]
    pub fn port_read(&mut self, port: u16, size: u8, now: VirtualTime) -> u32 {
        self.advance(now);
        let bytes = u16::from(size.clamp(1, 4));
        (0..bytes).fold(0, |value, offset| {
            let byte = self.read_byte(port.wrapping_add(offset), bytes == 1);
            value | u32::from(byte) << (8 * offset)
        })
    }

    /// Takes OUT; `size` is 1, 2 or 4 bytes. Every device is eight bits wide, so wider accesses are
    /// accesses to neighbouring ports, the lowest first.
    #[inline]
    pub fn port_write(&mut self, port: u16, size: u8, value: u32, now: VirtualTime) {
        self.advance(now);
        let bytes = u16::from(size.clamp(1, 4));
        for offset in 0..bytes {
            let byte = (value >> (8 * offset)) as u8;
            self.write_byte(port.wrapping_add(offset), byte, bytes == 1);
        }
    }

    /// `alone`: the access is one byte wide.
    #[inline]
    fn read_byte(&mut self, port: u16, alone: bool) -> u8 {
        match part_at(port) {
            Part::Serial(register) => {
                let rise_before_ns = self.uart.next_rise_ns();
                let value = self.uart.read(register, self.now_ns);
                self.after_serial_access(rise_before_ns, false);
                value
            }
            Part::KeyboardData => {
                let value = self.keyboard.read_data();
                self.after_keyboard_access(false);
                value
            }
            Part::KeyboardCommand => self.keyboard.read_status(),
            Part::ResetControl if !alone => ABSENT,
            Part::PortA | Part::ResetControl => self.reset.read(port),
            Part::DebugExit => debug_exit::READS_AS,
            Part::Nothing | Part::CounterControl | Part::ClockIndex => ABSENT,
            Part::Interrupts | Part::Counter(_) | Part::PortB | Part::ClockData => {
                self.catch_up();
                let value = self.read_timed_byte(port);
                self.update_deadline();
                value
            }
        }
    }

    /// Reads from what looks at the time or at interrupt requests.
    fn read_timed_byte(&mut self, port: u16) -> u8 {
        match part_at(port) {
            Part::Interrupts => self.pic.read(port),
            Part::Counter(index) => self.pit.read_counter(index),
            Part::PortB => self.pit.read_port_b(),
            Part::ClockData => {
                let value = self.rtc.read();
                self.pic.set_line(CLOCK_IRQ, self.rtc.interrupt());
                value
            }
            _ => ABSENT,
        }
    }

    /// `alone`: the access is one byte wide.
    #[inline]
    fn write_byte(&mut self, port: u16, value: u8, alone: bool) {
        match part_at(port) {
            Part::Serial(register) => {
                let rise_before_ns = self.uart.next_rise_ns();
                let written = self.uart.write(register, value, self.now_ns);
                if written.transmitted {
                    self.console_output.push(value);
                }
                self.after_serial_access(rise_before_ns, written.interrupt_dipped);
            }
            Part::KeyboardData => {
                let resets = self.keyboard.write_data(value);
                self.after_keyboard_access(resets);
            }
            Part::KeyboardCommand => {
                let resets = self.keyboard.write_command(value);
                self.after_keyboard_access(resets);
            }
            Part::ResetControl if !alone => {}
            Part::PortA | Part::ResetControl => {
                if self.reset.write(port, value) {
                    self.set_power_event(PowerEvent::Reset);
                }
            }
            Part::DebugExit => self.set_power_event(PowerEvent::DebugExit(value)),
            Part::ClockIndex => self.rtc.select(value),
            Part::Nothing => {}
            Part::Interrupts
            | Part::Counter(_)
            | Part::CounterControl
            | Part::PortB
            | Part::ClockData => {
                self.catch_up();
                self.write_timed_byte(port, value);
                self.update_deadline();
            }
        }
    }

    /// Writes to what looks at the time or at interrupt requests.
    fn write_timed_byte(&mut self, port: u16, value: u8) {
        let timer_output_rose = match part_at(port) {
            Part::Counter(index) => self.pit.write_counter(index, value),
            Part::CounterControl => self.pit.write_control(value),
            _ => false,
        };
        match part_at(port) {
            Part::Interrupts => self.pic.write(port, value),
            Part::PortB => self.pit.write_port_b(value),
            Part::ClockData => {
                self.rtc.write(value);
                self.pic.set_line(CLOCK_IRQ, self.rtc.interrupt());
            }
            _ if timer_output_rose => self.raise_timer_interrupt(),
            _ => {}
        }
    }

    /// `rise_before_ns`: when the interrupt pin would have risen by itself. `dipped`: the pin was
    /// low for an instant.
    #[inline]
    fn after_serial_access(&mut self, rise_before_ns: Option<u64>, dipped: bool) {
        let changed = self.uart.interrupt() != self.serial_interrupt;
        if dipped {
            self.pic.set_line(SERIAL_IRQ, false);
        }
        if changed || dipped {
            self.drive_serial_interrupt();
        }
        if changed || dipped || self.uart.next_rise_ns() != rise_before_ns {
            self.catch_up();
        }
    }

    fn after_keyboard_access(&mut self, resets: bool) {
        self.pic.set_line(KEYBOARD_IRQ, self.keyboard.interrupt());
        if resets {
            self.set_power_event(PowerEvent::Reset);
        }
        self.catch_up();
    }

    fn set_power_event(&mut self, event: PowerEvent) {
        self.power_event.get_or_insert(event);
    }

    /// Answers a load from an address without RAM; `size` is 1 to 16 bytes. Nothing is there.
    pub fn mmio_read(&mut self, _address: u64, size: u8, now: VirtualTime) -> u128 {
        self.advance(now);
        u128::MAX >> (128 - 8 * u32::from(size.clamp(1, 16)))
    }

    /// Takes a store to an address without RAM. Nothing is there.
    pub fn mmio_write(&mut self, _address: u64, _size: u8, _value: u128, now: VirtualTime) {
        self.advance(now);
    }

    /// The INTR line from the master PIC to the CPU.
    #[inline]
    pub fn interrupt_pending(&self) -> bool {
        self.pic.interrupt_pending()
    }

    /// The CPU's interrupt-acknowledge cycle: the vector to deliver. The machine has carried the
    /// board to the present. Without a pending interrupt this gives a spurious one, as the real
    /// part does.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        self.catch_up();
        let vector = self.pic.acknowledge();
        self.update_deadline();
        vector
    }

    /// How many console bytes the guest would take now: as many as the receive FIFO has room for,
    /// once the guest takes receive interrupts or polls for input.
    #[inline]
    pub fn console_room(&self) -> usize {
        self.uart.room()
    }

    /// Bytes typed on the console arrive. Those beyond [`Board::console_room`] may be lost.
    pub fn console_input(&mut self, bytes: Logged<Vec<u8>>, now: VirtualTime) {
        self.receive(bytes.get(), now);
    }

    fn receive(&mut self, bytes: &[u8], now: VirtualTime) {
        self.advance(now);
        self.catch_up();
        self.uart.receive(bytes, self.now_ns);
        self.drive_serial_interrupt();
        self.update_deadline();
    }

    /// Whether the guest has written to the console since the last
    /// [`Board::take_console_output`].
    #[inline]
    pub fn has_console_output(&self) -> bool {
        !self.console_output.is_empty()
    }

    /// What the guest has written to the console since the last call.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.console_output)
    }

    /// How the guest has asked for the end of the run, once.
    #[inline]
    pub fn take_power_event(&mut self) -> Option<PowerEvent> {
        self.power_event.take()
    }

    /// Everything that decides what the board does next. Console output that nobody has taken yet
    /// is not part of it: it has left the machine already.
    pub fn save(&self) -> BoardState {
        let mut board = self.clone();
        board.catch_up();
        BoardState {
            version: STATE_VERSION,
            now_ns: board.now_ns,
            power_event: board.power_event,
            pic: board.pic.save(),
            pit: board.pit.save(),
            rtc: board.rtc.save(),
            uart: board.uart.save(),
            keyboard: board.keyboard.save(),
            reset: board.reset.save(),
        }
    }

    /// Takes up a saved state; forgets console output that nobody has taken.
    ///
    /// # Errors
    /// If the state or a device's part of it has a version that this build does not know, or is one
    /// that is never reached; the board is then unchanged.
    pub fn load(&mut self, state: &BoardState) -> Result<(), LoadError> {
        const DEVICE: &str = "board";
        if state.version != STATE_VERSION {
            let (found, known) = (state.version, STATE_VERSION);
            return Err(LoadError::Version { device: DEVICE, found, known });
        }
        let uart = Uart::from_saved(&state.uart)?;
        let mut board = Self {
            now_ns: state.now_ns,
            deadline_ns: NEVER_NS,
            serial_interrupt: uart.interrupt(),
            pic: Pic::from_saved(&state.pic)?,
            pit: Pit::from_saved(&state.pit)?,
            rtc: Rtc::from_saved(&state.rtc)?,
            uart,
            keyboard: KeyboardController::from_saved(&state.keyboard)?,
            reset: ResetPorts::from_saved(&state.reset)?,
            power_event: state.power_event,
            console_output: Vec::new(),
        };
        let stands = board.pit.stands_at(board.now_ns) && board.rtc.stands_at(board.now_ns);
        if !stands || board.now_ns > END_OF_TIME_NS {
            return Err(LoadError::Impossible { device: DEVICE });
        }
        board.update_deadline();
        *self = board;
        Ok(())
    }
}
