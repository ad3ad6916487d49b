//! The counters against a model that counts edge by edge as the datasheet tells it, and the sequences
//! of guests that are known.

use alloc::vec::Vec;
use reprise_random::Random;

use super::*;
use crate::state::contract::device_contract;
use crate::time::NS_PER_S;

device_contract!(Pit::new(), |pit: &mut Pit, random| {
    let now_ns = CLOCK.first_ns_with(pit.edges + random.below(40));
    pit.advance(now_ns);
    let index = random.below(3) as usize;
    match random.below(6) {
        0 => u64::from(pit.write_control(random.byte())),
        1 => u64::from(pit.write_counter(index, random.pick(&[0, 1, 2, 3, 9, 0x20, 0xff]))),
        2 => {
            pit.write_port_b(random.byte());
            0
        }
        3 => u64::from(pit.read_port_b()),
        4 => pit.next_rise_ns().unwrap_or(0),
        _ => u64::from(pit.read_counter(index)),
    }
});

/// A counter that is clocked.
#[derive(Debug)]
struct Clocked {
    mode: u8,
    modulus: u32,
    gate: bool,
    output: bool,
    register: u32,
    null_count: bool,
    count_written: bool,
    /// The element and the count last loaded into it, once it is.
    element: u32,
    loaded: Option<u32>,
    loads_next: bool,
}

impl Clocked {
    fn control(&mut self, mode: u8, decimal: bool) {
        // The largest count shows as zero, and is zero to a count of another modulus.
        self.element %= self.modulus;
        self.mode = mode;
        self.modulus = if decimal { 10_000 } else { 0x1_0000 };
        self.output = mode != 0;
        self.null_count = true;
        self.count_written = false;
        self.loaded = None;
        self.loads_next = false;
    }

    fn first_of_two_bytes(&mut self) {
        if self.mode == 0 {
            self.output = false;
            self.loaded = None;
            self.loads_next = false;
        }
    }

    fn count(&mut self, count: u32) {
        self.first_of_two_bytes();
        self.register = if count == 0 { self.modulus } else { count };
        self.null_count = true;
        self.count_written = true;
        match self.mode {
            0 | 4 => self.loads_next = true,
            2 | 3 => self.loads_next |= self.loaded.is_none(),
            _ => {}
        }
    }

    fn set_gate(&mut self, high: bool) {
        let rises = high && !self.gate;
        self.gate = high;
        if rises && matches!(self.mode, 1 | 2 | 3 | 5) && self.count_written {
            self.loads_next = true;
        }
        if !high && matches!(self.mode, 2 | 3) {
            self.output = true;
        }
    }

    fn load(&mut self) {
        self.loads_next = false;
        self.null_count = false;
        self.loaded = Some(self.register);
        let odd_square_wave = self.mode == 3 && !self.register.is_multiple_of(2);
        self.element = self.register - u32::from(odd_square_wave);
    }

    fn clock(&mut self) {
        if self.loads_next {
            self.load();
            self.output = !matches!(self.mode, 0 | 1);
            return;
        }
        let Some(loaded) = self.loaded else {
            return;
        };
        if !self.gate && !matches!(self.mode, 1 | 5) {
            return;
        }
        match self.mode {
            2 if self.element == 1 => {
                self.load();
                self.output = true;
            }
            3 => {
                let last = if !loaded.is_multiple_of(2) && self.output { 0 } else { 2 };
                if self.element == last {
                    self.load();
                    self.output = !self.output;
                } else {
                    self.element -= 2;
                }
            }
            _ => self.count_down(),
        }
    }

    fn count_down(&mut self) {
        self.element = (self.element + self.modulus - 1) % self.modulus;
        match self.mode {
            0 | 1 => self.output |= self.element == 0,
            2 => self.output = self.element != 1,
            // The strobe comes once a load.
            _ => {
                let first_time = self.element == 0 && self.loaded != Some(0);
                self.output = !first_time;
                if first_time {
                    self.loaded = Some(0);
                }
            }
        }
    }
}

fn read_status(counter: &mut Counter, edge: u64) -> u8 {
    counter.read_back(0b1110_0000, edge);
    counter.read(edge)
}

/// Latches and reads both bytes, of which only those that the port moves are real.
fn read_count(counter: &mut Counter, access: u8, edge: u64) -> u16 {
    counter.read_back(0b1101_0000, edge);
    match access {
        1 => u16::from(counter.read(edge)),
        2 => u16::from(counter.read(edge)) << 8,
        _ => u16::from_le_bytes([counter.read(edge), counter.read(edge)]),
    }
}

fn coded(value: u32, modulus: u32, access: u8) -> u16 {
    let value = value % modulus;
    let coded = if modulus == 10_000 {
        u16::from_str_radix(&alloc::format!("{value}"), 16).unwrap()
    } else {
        value as u16
    };
    coded & [0, 0xff, 0xff00, 0xffff][usize::from(access)]
}

/// One counter in both forms, driven alike.
struct Pair {
    counter: Counter,
    clocked: Clocked,
    access: u8,
    edge: u64,
}

impl Pair {
    fn new() -> Self {
        let clocked = Clocked {
            mode: 0,
            modulus: 0x1_0000,
            gate: true,
            output: false,
            register: 1,
            null_count: true,
            count_written: false,
            element: 0,
            loaded: None,
            loads_next: false,
        };
        let mut pit = Pit::new();
        pit.counters[0].control(0x30, 0);
        // The element starts with what the counter shows.
        let mut pair = Self { counter: pit.counters[0].clone(), clocked, access: 3, edge: 0 };
        pair.clocked.element = u32::from(read_count(&mut pair.counter, 3, 0));
        pair
    }

    fn random_action(&mut self, random: &mut Random) {
        match random.below(4) {
            0 => {
                let (mode, decimal) = (random.below(6) as u8, random.below(2) as u8);
                self.access = random.pick(&[1, 2, 3]);
                self.counter.control(self.access << 4 | mode << 1 | decimal, self.edge);
                self.clocked.control(mode, decimal != 0);
                self.write_count(random);
            }
            1 => self.write_count(random),
            _ => {
                let high = random.below(2) != 0;
                self.counter.set_gate(high, self.edge);
                self.clocked.set_gate(high);
            }
        }
    }

    fn write_count(&mut self, random: &mut Random) {
        // A count of one is illegal in the periodic modes.
        let low = random.pick(&[2, 3, 4, 5, 8, 9]);
        let high = random.pick(&[0, 0, 1]);
        let weight = if self.clocked.modulus == 10_000 { 100 } else { 256 };
        match self.access {
            1 => {
                self.counter.write(low, self.edge);
                self.clocked.count(low.into());
            }
            2 => {
                self.counter.write(high, self.edge);
                self.clocked.count(u32::from(high) * weight);
            }
            _ => {
                self.counter.write(low, self.edge);
                self.clocked.first_of_two_bytes();
                self.check("between two bytes");
                self.clock();
                self.counter.write(high, self.edge);
                self.clocked.count(u32::from(high) * weight + u32::from(low));
            }
        }
    }

    fn clock(&mut self) {
        self.edge += 1;
        self.counter.settle(self.edge);
        self.clocked.clock();
    }

    fn check(&mut self, context: &str) {
        let Self { counter, clocked, access, edge } = self;
        let status = read_status(counter, *edge);
        assert_eq!(status & 0x80 != 0, clocked.output, "output, {context}, {clocked:?}");
        assert_eq!(status & 0x40 != 0, clocked.null_count, "null count, {context}, {clocked:?}");
        let count = read_count(counter, *access, *edge);
        let expected = coded(clocked.element, clocked.modulus, *access);
        assert_eq!(count, expected, "count, {context}, {clocked:?}, {counter:?}");
    }
}

#[test]
fn every_mode_counts_as_a_clocked_counter_does() {
    for seed in 1..=300 {
        let mut random = Random::new(seed);
        let mut pair = Pair::new();
        for action in 0..60 {
            pair.random_action(&mut random);
            let context = alloc::format!("seed {seed}, action {action}");
            pair.check(&context);
            let mut predicted = pair.counter.next_rise(pair.edge);
            for _ in 0..random.pick(&[1, 2, 7, 40, 600]) {
                let before = pair.clocked.output;
                pair.clock();
                pair.check(&context);
                let rises = !before && pair.clocked.output;
                assert_eq!(rises, predicted == Some(pair.edge), "{context}: {predicted:?}");
                if rises {
                    predicted = pair.counter.next_rise(pair.edge);
                }
            }
        }
    }
}

/// The times of counter 0's next rises, in clock edges since `start_ns`.
fn rises(pit: &mut Pit, start_ns: u64, count: usize) -> Vec<u64> {
    let start = CLOCK.edges_at(start_ns);
    let mut rises = Vec::new();
    while rises.len() < count {
        let Some(rise_ns) = pit.next_rise_ns() else {
            break;
        };
        assert!(!pit.advance(rise_ns - 1), "nothing happens before the deadline");
        assert!(pit.advance(rise_ns), "the deadline is a rise");
        rises.push(CLOCK.edges_at(rise_ns) - start);
    }
    rises
}

#[test]
fn deadlines_of_each_mode() {
    let cases: [(u8, &[u64]); 4] = [
        // Terminal count, once: one edge to load, then the count.
        (0x30, &[1001]),
        (0x34, &[1001, 2001, 3001]),
        (0x36, &[1001, 2001, 3001]),
        // The strobe is low for an edge, and then rises.
        (0x38, &[1002]),
    ];
    for (control, expected) in cases {
        let mut pit = Pit::new();
        let start_ns = 777_777;
        pit.advance(start_ns);
        pit.write_control(control);
        pit.write_counter(0, (1000 % 256) as u8);
        pit.write_counter(0, (1000 / 256) as u8);
        assert_eq!(rises(&mut pit, start_ns, 3), expected, "control word {control:02x}");
    }
}

#[test]
fn firmware_leaves_the_timer_at_18_2_hertz() {
    let mut pit = Pit::new();
    assert_eq!(rises(&mut pit, 0, 2), [65_536, 131_072]);
    assert_eq!(pit.next_rise_ns(), Some(CLOCK.first_ns_with(3 * 65_536)));
    assert_eq!(CLOCK.first_ns_with(65_536), 54_925_402);
}

/// As Linux calibrates the TSC: counter 2 behind port B, mode 0, until its output rises.
#[test]
fn counter_2_times_a_calibration_through_port_b() {
    let mut pit = Pit::new();
    let start_ns = 5 * NS_PER_S;
    pit.advance(start_ns);
    let port_b = pit.read_port_b();
    pit.write_port_b((port_b & !0x02) | 0x01);
    assert!(!pit.write_control(0xb0), "that is not counter 0");
    let count: u16 = 11_932;
    pit.write_counter(2, count as u8);
    pit.write_counter(2, (count >> 8) as u8);
    assert_eq!(pit.read_port_b() & 0x20, 0);
    let end = CLOCK.edges_at(start_ns) + u64::from(count) + 1;
    pit.advance(CLOCK.first_ns_with(end) - 1);
    assert_eq!(pit.read_port_b() & 0x20, 0);
    pit.advance(CLOCK.first_ns_with(end));
    assert_eq!(pit.read_port_b() & 0x20, 0x20);
}

/// As Linux calibrates quickly: the most significant byte counts down evenly.
#[test]
fn the_most_significant_byte_falls_every_256_edges() {
    let mut pit = Pit::new();
    pit.write_port_b(0x01);
    pit.write_control(0xb0);
    pit.write_counter(2, 0xff);
    pit.write_counter(2, 0xff);
    let mut high_at = |edges| {
        pit.advance(CLOCK.first_ns_with(edges));
        [pit.read_counter(2), pit.read_counter(2)][1]
    };
    for high in (0..=0xfe).rev() {
        let falls = 1 + 256 * (0xff - u64::from(high));
        assert_eq!(high_at(falls - 1), high + 1);
        assert_eq!(high_at(falls), high);
    }
}

#[test]
fn the_refresh_bit_toggles_every_15_microseconds() {
    let mut pit = Pit::new();
    let mut toggles = 0;
    let mut last = pit.read_port_b() & 0x10;
    for now_ns in (0..NS_PER_S / 100).step_by(500) {
        pit.advance(now_ns);
        let refresh = pit.read_port_b() & 0x10;
        toggles += u32::from(refresh != last);
        last = refresh;
    }
    // Ten milliseconds.
    assert_eq!(toggles, 11_931 / 18);
}

#[test]
fn a_latched_count_stands_until_it_is_read() {
    let mut pit = Pit::new();
    pit.write_control(0x34);
    pit.write_counter(0, 0x00);
    pit.write_counter(0, 0x80);
    pit.advance(CLOCK.first_ns_with(1));
    pit.write_control(0x00);
    pit.advance(CLOCK.first_ns_with(1000));
    pit.write_control(0x00);
    assert_eq!([pit.read_counter(0), pit.read_counter(0)], [0x00, 0x80]);
    let live = [pit.read_counter(0), pit.read_counter(0)];
    assert_eq!(u16::from_le_bytes(live), 0x8000 - 999);
}
