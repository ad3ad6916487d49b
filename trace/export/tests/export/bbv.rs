//! Basic-block vectors, parsed again, against counts made from the machine's account.

use std::collections::HashMap;

use reprise_export::bbv::BasicBlockVectors;
use reprise_trace::instructions::{Event, Observer, Run, TraceError};

use crate::account::{retired, show};
use crate::synthetic::Options;

const INTERVAL: u64 = 1_000;

/// Counts instructions by block and interval in another way: by bytes, run by run.
#[derive(Default)]
struct Counts {
    intervals: Vec<HashMap<(u64, Vec<u8>), u64>>,
    current: HashMap<(u64, Vec<u8>), u64>,
    instructions: u64,
}

impl Observer for Counts {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let key = (run.block().physical(), run.block().bytes().to_vec());
        *self.current.entry(key).or_insert(0) += run.retired() as u64;
        self.instructions += run.retired() as u64;
        if self.instructions >= INTERVAL * (self.intervals.len() as u64 + 1) {
            self.intervals.push(std::mem::take(&mut self.current));
        }
        Ok(())
    }

    fn event(&mut self, _: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

fn parse(text: &str) -> Vec<Vec<(usize, u64)>> {
    let line = |line: &str| {
        let pairs = line.strip_prefix('T').expect("a line begins with T").trim_end();
        let pairs = pairs.split(' ').map(|pair| {
            let (index, count) =
                pair.strip_prefix(':').and_then(|pair| pair.split_once(':')).expect(":index:count");
            (index.parse().expect("an index"), count.parse().expect("a count"))
        });
        pairs.collect()
    };
    text.lines().map(line).collect()
}

#[test]
fn each_line_counts_an_interval() {
    for seed in 1..4 {
        let mut both = (BasicBlockVectors::new(Vec::new(), INTERVAL), Counts::default());
        let entries = show(Options::new(seed), 20_000, &mut both);
        let (exporter, counts) = both;
        let (bytes, summary) = exporter.into_parts();
        let lines = parse(&String::from_utf8(bytes).expect("text"));
        assert_eq!(lines.len() as u64, summary.intervals);
        assert_eq!(lines.len(), counts.intervals.len());
        let mut total = summary.instructions_left_over;
        let mut highest = 0;
        for (line, interval) in lines.iter().zip(&counts.intervals) {
            let sum: u64 = line.iter().map(|(_, count)| count).sum();
            total += sum;
            let mut ours: Vec<u64> = line.iter().map(|(_, count)| *count).collect();
            let mut theirs: Vec<u64> =
                interval.values().copied().filter(|count| *count > 0).collect();
            ours.sort_unstable();
            theirs.sort_unstable();
            assert_eq!(ours, theirs, "seed {seed}");
            assert!(line.is_sorted_by(|a, b| a.0 < b.0), "each index once, in order");
            assert!(line[0].0 >= 1, "indexes begin at 1");
            highest = highest.max(line[line.len() - 1].0);
        }
        let left = counts.instructions - INTERVAL * lines.len() as u64;
        let counted: u64 = counts.intervals.iter().flat_map(HashMap::values).sum();
        assert_eq!(total - summary.instructions_left_over, counted);
        assert_eq!(summary.instructions_left_over, left);
        assert_eq!(counts.instructions, retired(&entries).len() as u64);
        assert!(highest as u64 <= summary.blocks);
    }
}
