//! Translated code against interpreted code, through whole guests: the machine runs on an engine
//! that is both at once and compares them at random ticks (`twin.rs`).
//!
//! `REPRISE_SOAK_INSTRUCTIONS` makes the Linux soak longer, `REPRISE_SOAK_SEED` gives other ticks.

mod difference;
mod twin;
mod world;

use std::path::Path;

use reprise::boot::{self, GuestSource};
use reprise_cpu::translate::Translation;
use reprise_devices::board::{Board, BoardConfig};
use reprise_guest_images::{COMPUTE_AT_SCALE_1, WORKLOAD_W, embedded};
use reprise_machine::clock::TimeSource;
use reprise_machine::inputs::Recording;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Outcome;
use reprise_machine::ram::GuestRam;
use reprise_tests::linux_image::linux_image;
use reprise_trace::log::{DiscardSink, LogWriter};

use twin::Twin;
use world::Typist;

/// Where the real-time clock starts: any time will do, as long as it is always the same.
const RTC_START_S: u64 = 1_700_000_000;
const DEFAULT_SEED: u64 = 0x7477_696e;
/// Instructions of Linux, at most, unless the environment says otherwise: some seconds' worth. The
/// first 140 million unpack the kernel; behind them it changes address spaces and its own code.
const LINUX_INSTRUCTIONS: u64 = if cfg!(debug_assertions) { 10_000_000 } else { 200_000_000 };

/// A guest that runs this long has hot code.
const ENOUGH_TO_BE_HOT: u64 = 2_000_000;

/// A guest to be soaked.
struct Soak<'a> {
    source: GuestSource<'a>,
    ram_mib: u64,
    typed: &'a str,
    translation: Translation,
    /// Instructions, at most.
    limit: u64,
    /// Instructions between comparisons of all RAM.
    ram_every: u64,
    seed: u64,
}

/// What a soak came to: nothing differed.
struct Soaked {
    outcome: Outcome,
    console: String,
}

impl Soak<'_> {
    fn run(&self) -> Soaked {
        eprintln!("seed {:#x}, {:?}, {:?}", self.seed, self.translation, self.source.cmdline);
        let rams = [(); 2].map(|()| GuestRam::new(self.ram_mib).expect("the host has RAM"));
        let config = BoardConfig { ram_bytes: rams[0].ram_bytes(), rtc_start_s: RTC_START_S };
        let [state, other_state] =
            [0, 1].map(|index: usize| boot::load(&self.source, &rams[index]).expect("it boots"));
        assert_eq!(state, other_state, "loading is deterministic");
        let twin = Twin::new(rams, &state, self.translation, self.seed, self.ram_every);
        let inputs = Recording::new(Typist::new(self.typed), LogWriter::new(DiscardSink));
        let time = TimeSource::Ticks { ns_per_tick: 1 };
        let mut machine = Machine::new(twin, Board::new(&config), inputs, time);
        let outcome = machine.run_until(self.limit).expect("the machine runs");
        let (mut twin, _, inputs) = machine.into_parts();
        twin.compare_ram();
        let [translated, interpreted] = twin.profiles();
        eprintln!(
            "{} instructions in {} steps, {:?}: {} units entered {} times, {} instructions \
             interpreted in between",
            outcome.ticks,
            twin.steps(),
            outcome.conclusion,
            translated.units_translated,
            translated.entries,
            translated.interpreted,
        );
        assert_eq!((interpreted.units_translated, interpreted.entries), (0, 0));
        if outcome.ticks > ENOUGH_TO_BE_HOT {
            assert!(translated.units_translated > 0, "nothing was translated");
            assert!(translated.interpreted < outcome.ticks / 2, "most instructions ran translated");
        }
        let console = String::from_utf8_lossy(&inputs.host().console).into_owned();
        Soaked { outcome, console }
    }
}

fn seed() -> u64 {
    environment("REPRISE_SOAK_SEED").unwrap_or(DEFAULT_SEED)
}

/// A number in the environment.
fn environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let digits = text.replace('_', "");
    let number = digits
        .strip_prefix("0x")
        .map_or_else(|| digits.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok());
    Some(number.unwrap_or_else(|| panic!("{name} is no number: {text:?}")))
}

/// (guest, command line, what is typed, a part of the console's output)
const GUESTS: &[(&str, &str, &str, &str)] = &[
    ("hello", "", "", "ello"),
    ("hello32", "", "", "ello"),
    ("ticks", "hz=2000 count=40 poll=100", "", "ticks: "),
    ("ticks", "hz=18000 count=60 poll=3", "", "ticks: "),
    ("echo", "", "first line\rsecond line\rquit\r", "echo: 28 bytes"),
    ("compute", "scale=1", "", COMPUTE_AT_SCALE_1),
    ("misbehave", "do=absent", "", "absent: done"),
    ("misbehave", "do=divide", "", "exception 0 "),
    ("misbehave", "do=double-fault", "", "exception 8 "),
    ("misbehave", "do=wild-jump", "", "exception 14 "),
    ("misbehave", "do=wild-jump-no-idt", "", "misbehave: wild-jump-no-idt"),
    ("misbehave", "do=wild-page-tables", "", "misbehave: wild-page-tables"),
    ("misbehave", "do=flood", "", "misbehave: flood"),
];

fn soak_guests(translation: Translation) {
    for &(name, cmdline, typed, expected) in GUESTS {
        let guest = embedded(name).expect("it is listed");
        let soak = Soak {
            source: GuestSource { kernel: guest.image, initrd: None, cmdline },
            ram_mib: 32,
            typed,
            translation,
            // `flood` never ends; the others do before.
            limit: if cmdline == "do=flood" { 1_000_000 } else { 50_000_000 },
            ram_every: 2_000_000,
            seed: seed(),
        };
        let soaked = soak.run();
        assert!(soaked.console.contains(expected), "{name} {cmdline}: {:?}", soaked.console);
    }
}

#[test]
fn embedded_guests_do_the_same_translated_when_hot() {
    soak_guests(Translation::WhenHot);
}

#[test]
fn embedded_guests_do_the_same_translated_at_once() {
    soak_guests(Translation::AtOnce);
}

#[test]
fn linux_does_the_same_translated() {
    let Some(image) = linux_image(Path::new(env!("CARGO_TARGET_TMPDIR"))) else { return };
    let soak = Soak {
        source: GuestSource {
            kernel: &image.kernel.bytes,
            initrd: Some(&image.initrd.bytes),
            cmdline: &image.command_line,
        },
        ram_mib: 256,
        typed: WORKLOAD_W,
        translation: Translation::WhenHot,
        limit: environment("REPRISE_SOAK_INSTRUCTIONS").unwrap_or(LINUX_INSTRUCTIONS),
        ram_every: 50_000_000,
        seed: seed(),
    };
    let soaked = soak.run();
    if soaked.outcome.ticks < soak.limit {
        // It has come to the workload's end, which resets.
        for line in ["unpacked", "counted 100000", "forked 60"] {
            assert!(soaked.console.contains(line), "no {line:?} in\n{}", soaked.console);
        }
    }
}
