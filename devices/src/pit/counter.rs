//! One counter of the 8254. Nothing is counted edge by edge: what the counter holds and puts out at
//! any edge follows from the edge at which its counting element was last loaded.

use serde::{Deserialize, Serialize};

/// The six modes, by the datasheet's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    InterruptOnTerminalCount,
    OneShot,
    RateGenerator,
    SquareWave,
    SoftwareStrobe,
    HardwareStrobe,
}

/// Which bytes of the count the port moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

/// The counting element. Counts are in edges of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Element {
    /// Not loaded since the control word, or stopped by a write; shows this count.
    Idle(u32),
    /// Loaded with `count` at edge `since`. A square wave that starts with its low half has a
    /// `since` that lies before the load, perhaps before edge zero: arithmetic on it wraps.
    Running { since: u64, count: u32 },
    /// Loaded with `count`, then stopped by the gate after this many edges.
    Stopped { after: u64, count: u32 },
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    mode: Mode,
    access: Access,
    binary_coded_decimal: bool,
    gate: bool,
    /// The count register, 1 to 65536.
    register: u32,
    /// A count was written since the control word.
    count_written: bool,
    /// The register has not reached the element.
    null_count: bool,
    element: Element,
    /// The edge at which the register goes to the element; always in the future.
    load_at: Option<u64>,
    /// The first of two bytes to write.
    low_byte: Option<u8>,
    /// The next of two bytes to read is the second.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    fn new(control: u8) -> Self {
        let mut counter = Self {
            mode: Mode::InterruptOnTerminalCount,
            access: Access::LowThenHigh,
            binary_coded_decimal: false,
            gate: true,
            register: 1,
            count_written: false,
            null_count: true,
            element: Element::Idle(0),
            load_at: None,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        };
        counter.control(control, 0);
        counter
    }

    /// Counting since edge zero, after this control word and a count of one byte, or zero.
    pub(super) fn running(control: u8, count: u8) -> Self {
        let mut counter = Self::new(control);
        counter.set_register(u16::from(count), 0);
        counter.load(0);
        counter
    }

    /// With a count of zero, but a low gate.
    pub(super) fn gated_off(control: u8) -> Self {
        let mut counter = Self::running(control, 0);
        counter.set_gate(false, 0);
        counter
    }

    /// Whether this can be a counter that was settled at `edge`, as far as arithmetic relies on it.
    pub(super) fn is_possible(&self, edge: u64) -> bool {
        const ENDLESS: u64 = 1 << 62;
        let counts = 1..=0x1_0000;
        let element_is_possible = match self.element {
            Element::Idle(_) => true,
            Element::Running { since, count } => {
                counts.contains(&count) && edge.wrapping_sub(since) < ENDLESS
            }
            Element::Stopped { after, count } => counts.contains(&count) && after < ENDLESS,
        };
        // A load waits for the end of a period at most.
        let loads_soon = |load_at: u64| load_at > edge && load_at - edge <= 0x1_0000;
        edge < ENDLESS
            && element_is_possible
            && counts.contains(&self.register)
            && self.load_at.is_none_or(loads_soon)
    }

    /// What the counter counts modulo.
    fn modulus(&self) -> u32 {
        if self.binary_coded_decimal { 10_000 } else { 0x1_0000 }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, Mode::RateGenerator | Mode::SquareWave)
    }

    fn is_triggered(&self) -> bool {
        matches!(self.mode, Mode::OneShot | Mode::HardwareStrobe)
    }

    /// Edges since the load, while counting or stopped, and the count loaded.
    fn progress(&self, edge: u64) -> Option<(u64, u64)> {
        match self.element {
            Element::Idle(_) => None,
            Element::Running { since, count } => Some((edge.wrapping_sub(since), count.into())),
            Element::Stopped { after, count } => Some((after, count.into())),
        }
    }

    /// Moves the register to the element at `edge`.
    fn load(&mut self, edge: u64) {
        let count = self.register;
        let mut since = edge;
        if let (Mode::SquareWave, Some((elapsed, old))) = (self.mode, self.progress(edge))
            && matches!(self.element, Element::Running { .. })
            && elapsed % old == high_half(old)
        {
            // A new count that takes effect between the halves of a square wave starts low.
            since = edge.wrapping_sub(high_half(count.into()));
        }
        self.element = if self.gate || self.is_triggered() {
            Element::Running { since, count }
        } else {
            Element::Stopped { after: 0, count }
        };
        self.null_count = false;
        self.load_at = None;
    }

    /// Lets edges pass up to and with this one.
    pub(super) fn settle(&mut self, edge: u64) {
        if let Some(load_at) = self.load_at
            && load_at <= edge
        {
            self.load(load_at);
        }
    }

    /// The output pin after this edge, which is settled.
    pub(super) fn output(&self, edge: u64) -> bool {
        let Some((elapsed, count)) = self.progress(edge) else {
            return self.mode != Mode::InterruptOnTerminalCount;
        };
        let stopped = matches!(self.element, Element::Stopped { .. });
        match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => elapsed >= count,
            Mode::RateGenerator => stopped || count == 1 || elapsed % count != count - 1,
            Mode::SquareWave => stopped || elapsed % count < high_half(count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != count,
        }
    }

    /// The next edge after `edge`, which is settled, at which the output rises by itself.
    pub(super) fn next_rise(&self, edge: u64) -> Option<u64> {
        let rise = self.next_rise_of_element(edge);
        let Some(load_at) = self.load_at else {
            return rise;
        };
        if rise.is_some_and(|rise| rise < load_at) {
            return rise;
        }
        let mut loaded = self.clone();
        loaded.load(load_at);
        let rises_at_load = !self.output(load_at - 1) && loaded.output(load_at);
        if rises_at_load { Some(load_at) } else { loaded.next_rise_of_element(load_at) }
    }

    /// The same without regard to a load to come.
    fn next_rise_of_element(&self, edge: u64) -> Option<u64> {
        let Element::Running { since, count } = self.element else {
            return None;
        };
        let count = u64::from(count);
        let elapsed = edge.wrapping_sub(since);
        let rise = match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => count,
            Mode::RateGenerator | Mode::SquareWave if count == 1 => return None,
            Mode::RateGenerator | Mode::SquareWave => elapsed - elapsed % count + count,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => count + 1,
        };
        (rise > elapsed).then(|| since.wrapping_add(rise))
    }

    /// What the element holds after this edge, in binary.
    fn value(&self, edge: u64) -> u32 {
        let Some((elapsed, count)) = self.progress(edge) else {
            let Element::Idle(value) = self.element else {
                return 0;
            };
            return value;
        };
        let modulus = u64::from(self.modulus());
        let value = match self.mode {
            Mode::RateGenerator => count - elapsed % count,
            Mode::SquareWave => {
                let (phase, high) = (elapsed % count, high_half(count));
                let into_half = if phase < high { phase } else { phase - high };
                (count & !1) - 2 * into_half.min(count / 2)
            }
            _ => count + modulus - elapsed % modulus,
        };
        (value % modulus) as u32
    }

    /// What a read shows: the element, coded as the control word asks.
    fn coded_value(&self, edge: u64) -> u16 {
        let value = self.value(edge);
        if !self.binary_coded_decimal {
            return value as u16;
        }
        [1000, 100, 10, 1].iter().fold(0, |coded, unit| (coded << 4) | (value / unit % 10) as u16)
    }

    /// Takes a control word that is not the read-back command.
    pub(super) fn control(&mut self, value: u8, edge: u64) {
        let access = match (value >> 4) & 3 {
            0b00 => return self.latch_count(edge),
            0b01 => Access::Low,
            0b10 => Access::High,
            _ => Access::LowThenHigh,
        };
        let shown = self.value(edge) % self.modulus();
        self.mode = match (value >> 1) & 7 {
            0 => Mode::InterruptOnTerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::RateGenerator,
            3 | 7 => Mode::SquareWave,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        };
        self.access = access;
        self.binary_coded_decimal = value & 1 != 0;
        self.count_written = false;
        self.null_count = true;
        self.element = Element::Idle(shown);
        self.load_at = None;
        self.low_byte = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn latch_count(&mut self, edge: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.coded_value(edge));
        }
    }

    /// Takes a read-back command that selects this counter.
    pub(super) fn read_back(&mut self, command: u8, edge: u64) {
        if command & 0x20 == 0 {
            self.latch_count(edge);
        }
        if command & 0x10 == 0 && self.latched_status.is_none() {
            self.latched_status = Some(self.status(edge));
        }
    }

    fn status(&self, edge: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        u8::from(self.output(edge)) << 7
            | u8::from(self.null_count) << 6
            | access << 4
            | (self.mode as u8) << 1
            | u8::from(self.binary_coded_decimal)
    }

    /// Reads the port.
    pub(super) fn read(&mut self, edge: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched_count.unwrap_or_else(|| self.coded_value(edge));
        let [low, high] = count.to_le_bytes();
        let second = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::LowThenHigh => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if second || self.access == Access::Low {
            self.latched_count = None;
        }
        if second { high } else { low }
    }

    /// Writes the port.
    pub(super) fn write(&mut self, value: u8, edge: u64) {
        let value = u16::from(value);
        match (self.access, self.low_byte.take()) {
            (Access::Low, _) => self.set_register(value, edge),
            (Access::High, _) => self.set_register(value << 8, edge),
            (Access::LowThenHigh, Some(low)) => {
                self.set_register((value << 8) | u16::from(low), edge);
            }
            (Access::LowThenHigh, None) => {
                self.low_byte = Some(value as u8);
                if self.mode == Mode::InterruptOnTerminalCount {
                    self.stop(edge);
                }
            }
        }
    }

    /// Stops counting until a load.
    fn stop(&mut self, edge: u64) {
        self.element = Element::Idle(self.value(edge));
        self.load_at = None;
    }

    /// Takes a count, which reaches the element at the next edge or later.
    fn set_register(&mut self, coded: u16, edge: u64) {
        self.register = self.decoded(coded);
        self.count_written = true;
        self.null_count = true;
        match (self.mode, self.element) {
            (Mode::InterruptOnTerminalCount, _) => {
                self.stop(edge);
                self.load_at = Some(edge + 1);
            }
            (Mode::OneShot | Mode::HardwareStrobe, _) => {}
            (Mode::RateGenerator | Mode::SquareWave, Element::Running { since, count }) => {
                if self.load_at.is_none() {
                    let (elapsed, count) = (edge.wrapping_sub(since), u64::from(count));
                    self.load_at = Some(edge + self.edges_to_reload(elapsed % count, count));
                }
            }
            // The gate's rise loads.
            (Mode::RateGenerator | Mode::SquareWave, Element::Stopped { .. }) => {}
            _ => self.load_at = Some(edge + 1),
        }
    }

    /// Edges until a running rate generator or square wave takes up a new count.
    fn edges_to_reload(&self, phase: u64, count: u64) -> u64 {
        if self.mode == Mode::SquareWave && phase < high_half(count) {
            high_half(count) - phase
        } else {
            count - phase
        }
    }

    /// The number that a written count stands for; zero is the largest.
    fn decoded(&self, coded: u16) -> u32 {
        let coded = u32::from(coded);
        let count = if self.binary_coded_decimal {
            let digits = [12, 8, 4, 0].map(|shift| (coded >> shift) & 0xf);
            digits.iter().fold(0, |count, digit| count * 10 + digit)
        } else {
            coded
        };
        if count == 0 { self.modulus() } else { count.min(self.modulus()) }
    }

    /// Sets the gate pin.
    pub(super) fn set_gate(&mut self, high: bool, edge: u64) {
        if high == self.gate {
            return;
        }
        self.gate = high;
        let trigger_loads = self.is_periodic() || self.is_triggered();
        match (high, self.element) {
            (true, _) if trigger_loads && self.count_written => self.load_at = Some(edge + 1),
            (true, Element::Stopped { after, count }) => {
                self.element = Element::Running { since: edge.wrapping_sub(after), count };
            }
            (false, Element::Running { since, count }) if !self.is_triggered() => {
                let after = edge.wrapping_sub(since);
                self.element = Element::Stopped { after, count };
                if self.is_periodic() {
                    self.load_at = None;
                }
            }
            _ => {}
        }
    }
}

/// Edges of a square wave's period that are high.
fn high_half(count: u64) -> u64 {
    count.div_ceil(2)
}
