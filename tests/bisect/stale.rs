//! A guest that changes a page table entry and flushes nothing: what it reads behind that hangs on which
//! translations the processor happens to have forgotten.

use std::path::PathBuf;

use reprise_bisect::{Finding, Side, Unwatched, compare};
use reprise_random::Random;

use crate::broken::{Broken, Wrong};
use crate::recordings::{Workplace, open, reprise, text};
use crate::{cause, last_tick, question};

const CODE: u64 = 0x20_0000;
const PML4: u64 = CODE + 0x1000;
const PDPT: u64 = CODE + 0x2000;
const PAGE_DIRECTORY: u64 = CODE + 0x3000;
const PAGE_TABLE: u64 = CODE + 0x4000;
/// The other page that is mapped lies [`APART`] behind it.
const PAGE: u64 = CODE + 0x6000;
const APART: u32 = 0x1000;
/// Where now the one, now the other is mapped, by no table that the code lies in.
const MAPPED_AT: u64 = 0x100_0000;
const ROUNDS: u32 = 40;
/// Instructions before the first round, and in each.
const BEFORE: u64 = 4;
const IN_ROUND: u64 = 105;
/// The one that reads.
const READS: u64 = 102;

/// It maps the other page, waits a while, and adds up what it reads; then it resets the machine.
fn code() -> Vec<u8> {
    let word = |address: u64| (address as u32).to_le_bytes();
    [
        // mov eax, PML4; mov cr3, rax; xor ebx, ebx; mov edx, ROUNDS
        &[0xb8][..],
        &word(PML4),
        &[0x0f, 0x22, 0xd8, 0x31, 0xdb, 0xba],
        &ROUNDS.to_le_bytes(),
        // round: xor qword [PAGE_TABLE], APART
        &[0x48, 0x81, 0x34, 0x25],
        &word(PAGE_TABLE),
        &APART.to_le_bytes(),
        // mov ecx, 50; wait: dec ecx; jnz wait
        &[0xb9, 50, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc],
        // add rbx, [MAPPED_AT]
        &[0x48, 0x03, 0x1c, 0x25],
        &word(MAPPED_AT),
        // dec edx; jnz round; mov al, 0xfe; out 0x64, al; hlt
        &[0xff, 0xca, 0x75, 0xdf, 0xb0, 0xfe, 0xe6, 0x64, 0xf4],
    ]
    .concat()
}

fn put(bytes: &mut Vec<u8>, at: usize, what: &[u8]) {
    bytes.resize(bytes.len().max(at + what.len()), 0);
    bytes[at..at + what.len()].copy_from_slice(what);
}

/// As an ELF64 without a note: it starts in 64-bit mode.
fn image() -> Vec<u8> {
    let mut loaded = code();
    let mut set = |address: u64, value: u64| {
        put(&mut loaded, (address - CODE) as usize, &value.to_le_bytes());
    };
    set(PML4, PDPT | 3);
    set(PDPT, PAGE_DIRECTORY | 3);
    set(PAGE_DIRECTORY + 8, CODE | 0x83);
    set(PAGE_DIRECTORY + 8 * (MAPPED_AT >> 21), PAGE_TABLE | 3);
    set(PAGE_TABLE, PAGE | 3);
    set(PAGE, 1);
    set(PAGE + u64::from(APART), 100);
    let bytes = loaded.len() as u64;
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &CODE.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 52, &[64, 0, 56, 0, 1, 0]);
    put(&mut file, 64, &[1, 0, 0, 0, 7, 0, 0, 0]);
    for (index, word) in [0x200, CODE, CODE, bytes, bytes, 0x1000].into_iter().enumerate() {
        put(&mut file, 72 + 8 * index, &word.to_le_bytes());
    }
    put(&mut file, 0x200, &loaded);
    file
}

fn record(workplace: &Workplace) -> PathBuf {
    let (kernel, file) = (workplace.path("kernel"), workplace.path("a.rr"));
    std::fs::write(&kernel, image()).expect("a file");
    let words = ["--json", "record", "--engine", "soft", "--memory", "8", "--kernel"];
    let ran = reprise(&[&words[..], &[text(&kernel), "-o", text(&file)]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    file
}

/// The page that round `round` reads, if all translations are forgotten right behind instruction `forgotten`.
fn reads_second(round: u64, forgotten: u64) -> bool {
    let reads_at = |round: u64| BEFORE + round * IN_ROUND + READS;
    // The first round maps the second page, and the translation that is in use is as old as its first use.
    let filled = (0..=round).find(|round| reads_at(*round) > forgotten).unwrap_or(0);
    filled % 2 == 0
}

#[test]
fn two_that_forget_translations_elsewhere_part_by_a_stale_one() {
    let workplace = Workplace::new();
    let file = record(&workplace);
    let recording = open(&file);
    let last = last_tick(&recording);
    assert!(last > u64::from(ROUNDS) * IN_ROUND, "{last}");
    let mut parted = 0;
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let [one, other] = [0, 1].map(|_| random.below(u64::from(ROUNDS) * IN_ROUND));
        let forgets = |tick| {
            Side::with_engine("forgets", &recording, move |ram, _| {
                Broken::new(ram, Wrong::Forgets { tick })
            })
        };
        let sides = [forgets(one), forgets(other)];
        let compared = compare(&sides, &question(last), &mut Unwatched).expect("it runs");
        let parts_in = (0..u64::from(ROUNDS))
            .find(|round| reads_second(*round, one) != reads_second(*round, other));
        eprintln!("seed {seed}: forgotten behind {one} and {other}, they part in {parts_in:?}");
        let Some(round) = parts_in else {
            // What they hold differs all the same.
            let seen = |finding: &Finding| !finding.cpu.is_empty() || !finding.memory.is_empty();
            assert!(!compared.finding.as_deref().is_some_and(seen), "seed {seed}");
            continue;
        };
        parted += 1;
        let finding = compared.finding.as_ref().expect("they differ");
        assert_eq!(finding.instructions, BEFORE + round * IN_ROUND + READS, "{finding}");
        assert!(finding.cpu.iter().any(|row| row.name == "RBX"), "{finding}");
        assert_eq!(cause(&compared), "stale-translation", "{finding}");
    }
    assert!(parted > 1, "only {parted} pairs part");
}
