//! Checks, statistics and listings against the machine's own account.

use std::collections::HashSet;
use std::fs;

use reprise_export::check::Check;
use reprise_export::dump::{Dump, Shown};
use reprise_export::stats::{Counted, Interval, Report, Stats};
use reprise_export::symbols::Symbols;
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, Contents, Definition, Delivery, Event, Feed,
    InstructionDefinition, Mode,
};

use crate::account::{deliveries, retired, show, show_user};
use crate::synthetic::{Entry, Executed, Options};

#[test]
fn what_a_machine_did_passes_the_check() {
    for seed in 1..6 {
        let mut check = Check::default();
        show(Options::new(seed), 20_000, &mut check);
        assert_eq!(check.findings(), [], "seed {seed}");
        let check = show_user(seed, 20_000, Check::default());
        assert_eq!(check.findings(), [], "seed {seed}, user code only");
    }
}

/// A block of one instruction.
fn block(id: u32, linear: u64, bytes: &[u8]) -> Definition {
    let instruction =
        InstructionDefinition { bytes: bytes.to_vec(), ..InstructionDefinition::default() };
    let block = BlockDefinition {
        linear,
        physical: linear,
        next_page: None,
        mode: Mode::KERNEL,
        end: BlockEnd::Other,
        instructions: vec![instruction],
    };
    Definition { id, block }
}

#[test]
fn what_no_machine_does_is_found() {
    let nop = |id, linear| block(id, linear, &[0x90]);
    let delivery = |address| Event::Delivery {
        kind: Delivery::Interrupt,
        vector: 32,
        error_code: None,
        address,
        fault_address: None,
    };
    let jump = |id| block(id, 0x1000, &[0xeb, 0x10]);
    let runs = |first: Definition, second: Definition, event: Option<Event>| {
        let mut batch = Batch { definitions: vec![first, second], ..Batch::default() };
        batch.words.push(0);
        event.into_iter().for_each(|event| batch.push_event(event));
        batch.words.push(1);
        batch
    };
    let back = |address| Event::Return { address };
    let iret = |id| block(id, 0x1000, &[0x48, 0xcf]);
    let mut through_a_jump = jump(0);
    through_a_jump.block.instructions.extend(nop(0, 0x1002).block.instructions);
    let cases: [(Batch, u64); 12] = [
        (runs(iret(0), nop(1, 0x9000), Some(back(0x9000))), 0),
        (runs(iret(0), nop(1, 0x9000), Some(back(0x9001))), 1),
        (runs(through_a_jump, nop(1, 0x1003), None), 1),
        (runs(nop(0, 0x1000), nop(1, 0x1001), None), 0),
        (runs(nop(0, 0x1000), nop(1, 0x1002), None), 1),
        (runs(nop(0, 0x1000), nop(1, 0x5000), Some(delivery(0x1001))), 0),
        (runs(nop(0, 0x1000), nop(1, 0x5000), Some(delivery(0x1002))), 1),
        (runs(jump(0), nop(1, 0x1012), None), 0),
        (runs(jump(0), nop(1, 0x1002), None), 1),
        (runs(block(0, 0x1000, &[0x75, 0x10]), nop(1, 0x1002), None), 0),
        (runs(block(0, 0x1000, &[0xc3]), nop(1, 0x9000), None), 0),
        (runs(block(0, 0x1000, &[0x90, 0x90]), nop(1, 0x1002), None), 1),
    ];
    for (number, (batch, findings)) in cases.into_iter().enumerate() {
        let mut check = Check::default();
        Feed::new(Contents::default()).push(&batch, &mut check).expect("keeps the contract");
        assert_eq!(check.finding_count(), findings, "case {number}: {:?}", check.findings());
    }
}

#[test]
fn statistics_count_what_the_machine_did() {
    // Whole runs and parts of runs are counted in different ways: with everything both occur.
    for options in [Options::new(7), Options::with_everything(7)] {
        let mut stats = Stats::new(1_000);
        let entries = show(options, 20_000, &mut stats);
        let report = stats.report(&Symbols::new());
        agree(&report, &entries);
        let text = report.to_string();
        for word in ["CPL 0", "CPL 3", "movsq", "####", "conditional", "busiest blocks"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }
}

/// Compares counts with those of the machine's account.
fn agree(report: &Report, entries: &[Entry]) {
    let executed = retired(entries);
    let count =
        |what: &dyn Fn(&Executed) -> bool| executed.iter().filter(|one| what(one)).count() as u64;
    assert_eq!(report.instructions, executed.len() as u64);
    let by_privilege: Vec<_> =
        report.by_privilege.iter().map(|row| (row.cpl, row.instructions)).collect();
    let in_mode = |cpl| (cpl, count(&|one| one.mode.cpl == cpl));
    assert_eq!(by_privilege, [in_mode(0), in_mode(3)]);
    let all = entries.iter().filter_map(|entry| match entry {
        Entry::Instruction(one) => Some(one),
        Entry::Event(_) => None,
    });
    let accesses: Vec<_> = all.flat_map(|one| &one.accesses).collect();
    let reads: Vec<_> = accesses.iter().filter(|one| one.kind != AccessKind::Write).collect();
    let bytes: u64 = reads.iter().map(|one| u64::from(one.size_bytes)).sum();
    assert_eq!((report.reads, report.bytes_read), (reads.len() as u64, bytes));
    let writes = accesses.iter().filter(|one| one.kind != AccessKind::Read).count();
    assert_eq!(report.writes, writes as u64);
    let sizes: u64 = report.access_sizes.iter().map(|(_, count)| count).sum();
    assert_eq!(sizes, accesses.len() as u64);
    let movs = count(&|one| one.bytes[..1] == [0xf3]);
    let named = |rows: &[Counted], name: &str| {
        rows.iter().find(|row| row.name == name).map_or(0, |row| row.count)
    };
    assert_eq!(named(&report.mix, "movsq"), movs);
    assert_eq!(named(&report.kinds, "string"), movs);
    let kinds: u64 = report.kinds.iter().map(|row| row.count).sum();
    assert_eq!(kinds, report.instructions);
    let delivered: u64 = report.deliveries.iter().map(|row| row.count).sum();
    assert_eq!(delivered, deliveries(entries) as u64);
    let intervals = &report.intervals;
    assert!(intervals.len() >= 20, "{}", intervals.len());
    let sum = |of: fn(&Interval) -> u64| intervals.iter().map(of).sum::<u64>();
    assert_eq!(sum(Interval::instructions), report.instructions);
    assert_eq!(sum(|one| one.accesses), accesses.len() as u64);
    branches_agree(report, entries);
    footprint_agrees(report, entries);
}

/// A conditional branch was taken if what follows is not behind it.
fn branches_agree(report: &Report, entries: &[Entry]) {
    let mut expected = (0, 0);
    let mut undecided = None;
    for entry in entries {
        let arrived = match entry {
            Entry::Instruction(one) if one.retired => Some(one.linear),
            Entry::Event(Event::Delivery { address, .. }) => Some(*address),
            Entry::Event(Event::Skipped { address, .. }) => *address,
            _ => None,
        };
        if let (Some(arrived), Some(next)) = (arrived, undecided) {
            expected.1 += u64::from(arrived != next);
            undecided = None;
        }
        if let Entry::Instruction(one) = entry
            && one.retired
            && one.bytes[0] == 0x0f
            && one.bytes[1] == 0x85
        {
            expected.0 += 1;
            undecided = Some(one.linear + 6);
        }
    }
    let all = report.branches.by_type.iter().find(|row| row.name == "conditional").expect("some");
    assert_eq!((all.executed, all.taken), expected);
    assert!(all.taken > 0 && all.taken < all.executed);
    for rows in [&report.branches.by_direction, &report.branches.conditional] {
        let sums = rows.iter().fold((0, 0), |sum, row| (sum.0 + row.executed, sum.1 + row.taken));
        assert_eq!(sums, expected);
    }
}

/// Data pages and lines: physical ones where they are known, else linear ones of each process.
fn footprint_agrees(report: &Report, entries: &[Entry]) {
    let mut cr3 = 0;
    let (mut pages, mut lines) = (HashSet::new(), HashSet::new());
    for entry in entries {
        match entry {
            Entry::Event(Event::AddressSpace { cr3: new }) => cr3 = *new,
            Entry::Event(_) => {}
            Entry::Instruction(one) => {
                for access in &one.accesses {
                    let first = access.physical.unwrap_or(access.address);
                    let space = if first >> 63 == 1 || access.physical.is_some() { 0 } else { cr3 };
                    let last = first + u64::from(access.size_bytes) - 1;
                    pages.extend((first >> 12..=last >> 12).map(|page| (space, page)));
                    lines.extend((first >> 6..=last >> 6).map(|line| (space, line)));
                }
            }
        }
    }
    let set = &report.working_set;
    assert_eq!((set.data_pages, set.data_lines), (pages.len() as u64, lines.len() as u64));
    assert!(set.code_pages > 2 && set.code_lines > set.code_pages, "{set:?}");
    let last = report.intervals.last().expect("some").pages_so_far;
    assert_eq!(last, set.code_pages + set.data_pages);
    assert!(report.intervals.iter().all(|one| one.working_set.data_pages <= set.data_pages));
}

#[test]
fn code_is_counted_by_symbol() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let map = directory.path().join("System.map");
    fs::write(&map, "ffffffff80000000 T the_kernel\nffffffff90000000 T end\n").expect("written");
    let mut symbols = Symbols::new();
    assert_eq!(symbols.add_file(&map, 0x100_0000).expect("read"), 2);
    let mut stats = Stats::default();
    let entries = show(Options::new(3), 5_000, &mut stats);
    let report = stats.report(&symbols);
    let kernel = retired(&entries).iter().filter(|one| one.mode.cpl == 0).count() as u64;
    let row = |name: &str| {
        report.top_symbols.iter().find(|row| row.name == name).map_or(0, |row| row.count)
    };
    assert_eq!(row("the_kernel"), kernel);
    assert_eq!(row("(user, no symbol)"), report.instructions - kernel);
    let block = report.top_blocks.iter().find(|row| row.cpl == 0).expect("a kernel block");
    let offset = block.address - 0xffff_ffff_8100_0000;
    assert_eq!(block.symbol, Some(format!("the_kernel+{offset:#x}")));
}

#[test]
fn a_listing_shows_so_many_instructions() {
    let mut shown = Vec::new();
    let mut dump = Dump::new(Symbols::new(), Some(50), |entry: &Shown| {
        shown.push(entry.clone());
        Ok(())
    });
    let entries = show(Options::with_everything(8), 2_000, &mut dump);
    assert!(dump.is_full());
    drop(dump);
    let instructions: Vec<_> = shown
        .iter()
        .filter_map(|entry| match entry {
            Shown::Instruction(one) if one.retired => Some(one),
            _ => None,
        })
        .collect();
    assert_eq!(instructions.len(), 50);
    for (one, expected) in instructions.iter().zip(retired(&entries)) {
        assert_eq!((one.address, one.cpl), (expected.linear, expected.mode.cpl));
        assert_eq!(one.accesses.len(), expected.accesses.len());
        let text = Shown::Instruction((*one).clone()).to_string();
        assert!(text.contains(&format!("{:016x}", one.address)), "{text}");
        assert!(one.accesses.iter().all(|access| text.contains(&format!("{:x}", access.address))));
    }
    let text: Vec<String> = shown.iter().map(ToString::to_string).collect();
    assert!(text.iter().any(|line| line.contains("push")), "{text:#?}");
}

#[test]
fn a_listing_names_places_and_events() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let map = directory.path().join("System.map");
    fs::write(&map, "1000 t here\n1010 t there\n1100 t end\n").expect("written");
    let mut symbols = Symbols::new();
    symbols.add_file(&map, 0).expect("read");
    let mut lines = Vec::new();
    let mut dump = Dump::new(symbols, None, |entry: &Shown| {
        lines.push(entry.to_string());
        Ok(())
    });
    // A call of `there`, a page fault there, a gap.
    let mut batch = Batch {
        definitions: vec![block(0, 0x1004, &[0xe8, 0x0b, 0, 0, 0]), block(1, 0x1014, &[0x90])],
        words: vec![0, 1],
        ..Batch::default()
    };
    batch.push_event(Event::Delivery {
        kind: Delivery::Exception,
        vector: 14,
        error_code: Some(2),
        address: 0x1015,
        fault_address: Some(0xdead),
    });
    batch.push_event(Event::Skipped { instructions: 7, address: Some(0x1016) });
    Feed::new(Contents::default()).push(&batch, &mut dump).expect("keeps the contract");
    drop(dump);
    for (line, words) in lines.iter().zip([
        &["<here+0x4>", "call", "<there+0x4>"][..],
        &["<there+0x4>", "nop"],
        &["exception 14", "page fault", "0xdead", "<there+0x5>", "error code 0x2"],
        &["7 instructions left out", "<there+0x6>"],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
    }
    assert_eq!(lines.len(), 4);
}
