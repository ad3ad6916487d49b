//! Checks, statistics and listings against the machine's own account.

use reprise_export::check::Check;
use reprise_export::dump::Dump;
use reprise_export::stats::Stats;
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, Contents, Definition, Delivery, Event, Feed,
    InstructionDefinition, Mode,
};

use crate::account::{deliveries, retired, show, show_user};
use crate::synthetic::Options;

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
    let cases: [(Batch, u64); 9] = [
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
    let mut stats = Stats::default();
    let entries = show(Options::new(7), 20_000, &mut stats);
    let executed = retired(&entries);
    assert_eq!(stats.instructions(), executed.len() as u64);
    for cpl in [0, 3] {
        let count = executed.iter().filter(|one| one.mode.cpl == cpl).count();
        assert_eq!(stats.by_privilege[usize::from(cpl)], count as u64);
    }
    let all = entries.iter().filter_map(|entry| match entry {
        crate::synthetic::Entry::Instruction(one) => Some(one),
        crate::synthetic::Entry::Event(_) => None,
    });
    let accesses: Vec<_> = all.flat_map(|one| &one.accesses).collect();
    let reads: Vec<_> = accesses.iter().filter(|one| one.kind != AccessKind::Write).collect();
    let bytes: u64 = reads.iter().map(|one| u64::from(one.size_bytes)).sum();
    assert_eq!(stats.reads, (reads.len() as u64, bytes));
    let conditional =
        executed.iter().filter(|one| one.bytes[..1] == [0x0f] && one.bytes[1] == 0x85);
    assert_eq!(stats.conditional.0, conditional.count() as u64);
    assert!(stats.conditional.1 > 0 && stats.conditional.1 < stats.conditional.0);
    let movs = executed.iter().filter(|one| one.bytes[..1] == [0xf3]).count() as u64;
    assert!(stats.mix().contains(&("movsq".to_string(), movs)), "{:?}", stats.mix());
    assert_eq!(stats.deliveries.values().sum::<u64>(), deliveries(&entries) as u64);
    assert_eq!(
        stats.top_blocks().iter().map(|(_, count)| count).sum::<u64>(),
        stats.instructions()
    );
    let text = stats.to_string();
    for word in ["CPL 0", "CPL 3", "movsq", "####", "conditional branches", "busiest blocks"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
}

#[test]
fn a_listing_shows_so_many_instructions() {
    let mut dump = Dump::new(Vec::new(), 50);
    let entries = show(Options::with_everything(8), 2_000, &mut dump);
    assert!(dump.is_full());
    let text = String::from_utf8(dump.into_inner()).expect("text");
    let lines: Vec<&str> =
        text.lines().filter(|line| line.contains("  ") && !line.contains('{')).collect();
    let shown = lines.iter().filter(|line| !line.contains("not retired")).count();
    assert_eq!(shown, 50, "{text}");
    let first = retired(&entries)[0];
    assert!(lines[0].contains(&format!("{:016x}", first.linear)), "{}", lines[0]);
    assert!(text.contains("push"), "{text}");
}
