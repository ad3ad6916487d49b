//! ChampSim's own rules, applied to the records, give each branch its type, outcome and target.

use reprise_export::champsim::{ChampSim, RECORD_BYTES, Summary};
use reprise_trace::instructions::Event;

use crate::account::{deliveries, gaps, retired, show, show_user};
use crate::synthetic::{Entry, Executed, Options};

/// A record, taken apart.
#[derive(Clone, Debug)]
struct Record {
    ip: u64,
    is_branch: bool,
    taken: bool,
    destinations: Vec<u8>,
    sources: Vec<u8>,
    writes: Vec<u64>,
    reads: Vec<u64>,
}

fn records(bytes: &[u8]) -> Vec<Record> {
    assert_eq!(bytes.len() % RECORD_BYTES, 0);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let named = |bytes: &[u8]| bytes.iter().copied().filter(|one| *one != 0).collect();
    let used = |bytes: &[u8]| bytes.chunks(8).map(word).filter(|one| *one != 0).collect();
    let split = bytes.chunks(RECORD_BYTES).map(|one| Record {
        ip: word(&one[..8]),
        is_branch: one[8] != 0,
        taken: one[9] != 0,
        destinations: named(&one[10..12]),
        sources: named(&one[12..16]),
        writes: used(&one[16..32]),
        reads: used(&one[32..64]),
    });
    split.collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    NotBranch,
    DirectJump,
    Indirect,
    Conditional,
    DirectCall,
    IndirectCall,
    Return,
}

/// The type that ChampSim infers from the registers.
fn inferred(record: &Record) -> Kind {
    let writes = |register| record.destinations.contains(&register);
    let reads = |register| record.sources.contains(&register);
    let reads_other = record.sources.iter().any(|one| ![6, 25, 26].contains(one));
    let (sp, flags, ip) = (reads(6), reads(25), reads(26));
    if !writes(26) {
        Kind::NotBranch
    } else if !sp && !flags && !reads_other {
        Kind::DirectJump
    } else if !sp && !ip && !flags && reads_other {
        Kind::Indirect
    } else if !sp && ip && !writes(6) && (flags || reads_other) {
        Kind::Conditional
    } else if sp && ip && writes(6) && !flags && !reads_other {
        Kind::DirectCall
    } else if sp && ip && writes(6) && !flags && reads_other {
        Kind::IndirectCall
    } else if sp && !ip && writes(6) {
        Kind::Return
    } else {
        panic!("ChampSim knows no such branch: {record:?}");
    }
}

/// The type that the bytes say, of those that the synthetic machine has.
fn of_bytes(bytes: &[u8]) -> Kind {
    match bytes {
        [0x0f, 0x85, ..] => Kind::Conditional,
        [0xe8, ..] => Kind::DirectCall,
        [0xff, 0xd0] => Kind::IndirectCall,
        [0xc3] => Kind::Return,
        [0x0f, 0x05] | [0x48, 0xcf] => Kind::Indirect,
        _ => Kind::NotBranch,
    }
}

fn export(seed: u64) -> (Vec<Record>, Summary, Vec<Entry>) {
    let mut exporter = ChampSim::new(Vec::new());
    let entries = show(Options::new(seed), 20_000, &mut exporter);
    let (bytes, summary) = exporter.into_parts();
    (records(&bytes), summary, entries)
}

/// How many records an instruction has: one a repetition, and more where slots do not suffice.
fn records_of(executed: &Executed) -> usize {
    let pairs = executed.accesses.len() / 2;
    match executed.bytes[..] {
        [0xf3, ..] if executed.retired => pairs.max(1),
        [0xf3, ..] => executed.accesses.len().div_ceil(2),
        [0x48, 0xcf] => 2,
        _ => usize::from(executed.retired),
    }
}

#[test]
fn branches_have_their_type_outcome_and_target() {
    for seed in 1..4 {
        let (records, summary, entries) = export(seed);
        assert_eq!(records.len() as u64, summary.records);
        assert_eq!(summary.instructions, retired(&entries).len() as u64);
        let expected = (deliveries(&entries) + gaps(&entries)) as u64;
        assert_eq!(summary.synthetic, expected, "seed {seed}");
        let mut next = 0;
        let (mut branches, mut taken) = (0, 0);
        for entry in &entries {
            let executed = match entry {
                Entry::Instruction(executed) => executed,
                Entry::Event(
                    Event::Delivery { address, .. } | Event::Skipped { address: Some(address), .. },
                ) => {
                    // A jump that the machine did not execute, from where it was interrupted.
                    let record = &records[next];
                    assert_eq!(record.ip, *address, "seed {seed}, record {next}");
                    assert_eq!((inferred(record), record.taken), (Kind::Indirect, true));
                    next += 1;
                    continue;
                }
                Entry::Event(_) => continue,
            };
            let count = records_of(executed);
            let own = &records[next..next + count];
            next += count;
            let reads: Vec<u64> = own.iter().flat_map(|one| one.reads.clone()).collect();
            let writes: Vec<u64> = own.iter().flat_map(|one| one.writes.clone()).collect();
            let of = |wanted: fn(&crate::synthetic::Accessed) -> bool| -> Vec<u64> {
                executed.accesses.iter().filter(|one| wanted(one)).map(|one| one.address).collect()
            };
            assert_eq!(reads, of(|one| one.kind.reads()), "seed {seed}: {executed:?}");
            assert_eq!(writes, of(|one| one.kind.writes()), "seed {seed}: {executed:?}");
            assert!(own.iter().all(|one| one.ip == executed.linear), "seed {seed}: {executed:?}");
            let Some((last, before)) = own.split_last() else { continue };
            let kind = of_bytes(&executed.bytes);
            assert_eq!(inferred(last), kind, "seed {seed}: {executed:?} {last:?}");
            assert_eq!(last.is_branch, kind != Kind::NotBranch);
            let quiet = before.iter().all(|one| inferred(one) == Kind::NotBranch && !one.is_branch);
            assert!(quiet, "only the last record branches");
            if kind == Kind::Conditional {
                branches += 1;
                let Some(after) = records.get(next) else { continue };
                let fall_through = executed.linear + executed.bytes.len() as u64;
                let displacement =
                    i32::from_le_bytes(executed.bytes[2..].try_into().expect("four"));
                let target = fall_through.wrapping_add_signed(i64::from(displacement));
                // An interrupt right behind the branch does not change where it went.
                assert!([fall_through, target].contains(&after.ip), "seed {seed}: {last:?}");
                assert_eq!(last.taken, after.ip != fall_through, "seed {seed}: {last:?}");
                taken += usize::from(last.taken);
            } else {
                assert_eq!(last.taken, kind != Kind::NotBranch);
            }
            if kind == Kind::DirectCall
                && let Some(after) = records.get(next)
            {
                let displacement =
                    i32::from_le_bytes(executed.bytes[1..].try_into().expect("four"));
                let target = (executed.linear + 5).wrapping_add_signed(i64::from(displacement));
                assert_eq!(after.ip, target, "seed {seed}");
            }
        }
        assert_eq!(next, records.len(), "seed {seed}");
        assert!(branches > 100 && taken > 0 && taken < branches, "{taken} of {branches}");
    }
}

#[test]
fn a_gap_does_not_change_where_a_branch_went() {
    let (bytes, summary) = show_user(5, 20_000, ChampSim::new(Vec::new())).into_parts();
    let records = records(&bytes);
    assert!(summary.synthetic > 10, "{summary:?}");
    // Of the kernel there is only the jump back, from where SYSCALL led.
    let kernel = records.iter().filter(|one| one.ip >> 63 == 1);
    assert!(kernel.clone().all(|one| (one.is_branch, &one.sources[..]) == (true, &[255])));
    assert!(kernel.count() < records.len() / 20);
    for pair in records.windows(2) {
        let [one, next] = pair else { continue };
        // Whatever does not jump is followed by what is behind it, or by itself (REP).
        if !one.taken {
            assert!(next.ip >= one.ip && next.ip - one.ip <= 15, "{one:x?} then {next:x?}");
        }
    }
}

#[test]
fn registers_that_decide_stay_out_of_other_records() {
    let (records, ..) = export(6);
    let others = records.iter().filter(|one| !one.is_branch);
    assert!(others.clone().all(|one| !one.destinations.contains(&26)));
    assert!(others.clone().any(|one| one.destinations.contains(&25)), "flags are written");
    assert!(others.clone().any(|one| one.sources.iter().any(|register| *register >= 64)));
}
