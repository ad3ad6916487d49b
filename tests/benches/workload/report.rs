//! What a benchmark came to: a row for each contender, and the ratios that people ask for.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::contender::{Contender, Sample, Spread};

/// One contender divided by another, in the same round.
struct Ratio {
    key: &'static str,
    label: &'static str,
    dividend: &'static str,
    divisor: &'static str,
    value: fn(&Sample) -> Option<f64>,
}

fn process_seconds(sample: &Sample) -> Option<f64> {
    Some(sample.process_seconds)
}

fn guest_seconds(sample: &Sample) -> Option<f64> {
    sample.guest_seconds
}

fn cpu_seconds(sample: &Sample) -> Option<f64> {
    sample.cpu_seconds
}

fn user_seconds(sample: &Sample) -> Option<f64> {
    sample.user_seconds
}

/// Against QEMU, whole processes are compared; Reprise against itself, by what it reports.
const RATIOS: &[Ratio] = &[
    Ratio {
        key: "qemu_plain_by_run",
        label: "QEMU plain / Reprise run, process",
        dividend: "qemu_plain",
        divisor: "linux_run",
        value: process_seconds,
    },
    Ratio {
        key: "qemu_record_by_record",
        label: "QEMU record / Reprise record, process",
        dividend: "qemu_record",
        divisor: "linux_record",
        value: process_seconds,
    },
    Ratio {
        key: "record_by_run",
        label: "record / run, guest",
        dividend: "linux_record",
        divisor: "linux_run",
        value: guest_seconds,
    },
    Ratio {
        key: "record_by_run_process",
        label: "record / run, process",
        dividend: "linux_record",
        divisor: "linux_run",
        value: process_seconds,
    },
    Ratio {
        key: "record_by_run_cpu",
        label: "record / run, CPU",
        dividend: "linux_record",
        divisor: "linux_run",
        value: cpu_seconds,
    },
    Ratio {
        key: "replay_by_record",
        label: "replay / record, guest",
        dividend: "linux_replay",
        divisor: "linux_record",
        value: guest_seconds,
    },
    Ratio {
        key: "qemu_traced_by_expand",
        label: "QEMU traced / Reprise expand, process",
        dividend: "qemu_traced",
        divisor: "linux_expand",
        value: process_seconds,
    },
    Ratio {
        key: "expand_by_replay",
        label: "expand / replay, guest",
        dividend: "linux_expand",
        divisor: "linux_replay",
        value: guest_seconds,
    },
    Ratio {
        key: "compute_soft_by_kvm",
        label: "compute: soft / kvm sync, guest",
        dividend: "compute_soft",
        divisor: "compute_kvm_sync",
        value: guest_seconds,
    },
    Ratio {
        key: "kvm_record_by_run",
        label: "recording: compute, kvm sync, record / run, guest",
        dividend: "recording_record",
        divisor: "recording_run",
        value: guest_seconds,
    },
    Ratio {
        key: "kvm_record_by_run_cpu",
        label: "recording: compute, kvm sync, record / run, CPU",
        dividend: "recording_record",
        divisor: "recording_run",
        value: cpu_seconds,
    },
    Ratio {
        key: "kvm_user_by_process",
        label: "user code: kvm sync / a process, user",
        dividend: "user_code_kvm",
        divisor: "user_code_process",
        value: user_seconds,
    },
];

/// Medians, and why some are missing.
pub(crate) struct Report<'a> {
    runs: usize,
    small: bool,
    contenders: &'a [Contender],
    missing: &'a [(String, String)],
}

/// A contender's medians.
struct Row {
    guest_seconds: Option<f64>,
    process_seconds: Option<f64>,
    cpu_seconds: Option<f64>,
    mips: Option<f64>,
    log_bytes: Option<f64>,
    bytes_per_kiloinstruction: Option<f64>,
    bits_per_instruction: Option<f64>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(
        runs: usize,
        small: bool,
        contenders: &'a [Contender],
        missing: &'a [(String, String)],
    ) -> Self {
        Self { runs, small, contenders, missing }
    }

    fn contender(&self, key: &str) -> Option<&Contender> {
        self.contenders.iter().find(|contender| contender.key == key)
    }

    /// QEMU and the `sync` clock count no instructions that they would tell; theirs are taken from
    /// the contender that runs the same work and counts, if there is one.
    fn instructions(&self, contender: &Contender) -> Option<f64> {
        let counted = |contender: &Contender| contender.median(|sample| sample.instructions);
        let works = [("compute_", "compute_soft"), ("linux_", "linux_run"), ("qemu_", "linux_run")];
        counted(contender).or_else(|| {
            let (_, same_work) = works.iter().find(|(work, _)| contender.key.starts_with(work))?;
            counted(self.contender(same_work)?)
        })
    }

    fn row(&self, contender: &Contender) -> Row {
        let guest_seconds = contender.median(guest_seconds);
        let process_seconds = contender.median(process_seconds);
        let log_bytes = contender.median(|sample| sample.log_bytes);
        let instructions = self.instructions(contender);
        let per_instruction = |value: Option<f64>| Some(value? / instructions?);
        Row {
            guest_seconds,
            process_seconds,
            cpu_seconds: contender.median(cpu_seconds),
            mips: per_instruction(guest_seconds.or(process_seconds)).map(|seconds| 1e-6 / seconds),
            log_bytes,
            bytes_per_kiloinstruction: per_instruction(log_bytes).map(|bytes| bytes * 1e3),
            bits_per_instruction: per_instruction(contender.median(|sample| sample.trace_bytes))
                .map(|bytes| bytes * 8.0),
        }
    }

    fn ratio(&self, ratio: &Ratio) -> Option<Spread> {
        let (dividend, divisor) = (self.contender(ratio.dividend)?, self.contender(ratio.divisor)?);
        dividend.ratio(divisor, ratio.value)
    }

    pub(crate) fn to_json(&self) -> Value {
        let medians = self.contenders.iter().map(|contender| {
            let row = self.row(contender);
            let value = json!({
                "guest_seconds": row.guest_seconds,
                "process_seconds": row.process_seconds,
                "cpu_seconds": row.cpu_seconds,
                "mips": row.mips,
                "log_bytes": row.log_bytes,
                "bytes_per_kiloinstruction": row.bytes_per_kiloinstruction,
                "bits_per_instruction": row.bits_per_instruction,
            });
            (contender.key.to_owned(), value)
        });
        let ratios = RATIOS.iter().map(|ratio| {
            let median = self.ratio(ratio).map(|spread| spread.median);
            (ratio.key.to_owned(), median.into())
        });
        let spreads = RATIOS.iter().map(|ratio| {
            let spread = self.ratio(ratio).map(|spread| [spread.least, spread.greatest]);
            (ratio.key.to_owned(), json!(spread))
        });
        let confidences = RATIOS.iter().map(|ratio| {
            let confidence = self.ratio(ratio).and_then(|spread| spread.confidence);
            (ratio.key.to_owned(), json!(confidence))
        });
        let missing =
            self.missing.iter().map(|(what, reason)| (what.clone(), reason.as_str().into()));
        json!({
            "runs": self.runs,
            "small": self.small,
            "medians": medians.collect::<Map<_, _>>(),
            "ratios": ratios.collect::<Map<_, _>>(),
            "ratio_confidences": confidences.collect::<Map<_, _>>(),
            "ratio_spreads": spreads.collect::<Map<_, _>>(),
            "not_measured": missing.collect::<Map<_, _>>(),
        })
    }

    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:24} {:>9} {:>9} {:>9} {:>8} {:>11} {:>12} {:>10}",
            "medians",
            "guest s",
            "process s",
            "CPU s",
            "MIPS",
            "log bytes",
            "bytes/kinstr",
            "bits/instr"
        );
        for contender in self.contenders {
            let row = self.row(contender);
            let _ = writeln!(
                text,
                "{:24} {:>9} {:>9} {:>9} {:>8} {:>11} {:>12} {:>10}",
                contender.label,
                or_dash(row.guest_seconds, 3),
                or_dash(row.process_seconds, 3),
                or_dash(row.cpu_seconds, 2),
                or_dash(row.mips, 1),
                or_dash(row.log_bytes, 0),
                or_dash(row.bytes_per_kiloinstruction, 5),
                or_dash(row.bits_per_instruction, 3),
            );
        }
        text.push('\n');
        let raced = |ratio: &&Ratio| {
            [ratio.dividend, ratio.divisor].iter().any(|key| self.contender(key).is_some())
        };
        for ratio in RATIOS.iter().filter(raced) {
            let spread = self.ratio(ratio);
            let median = or_dash(spread.map(|spread| spread.median), 3);
            let range = spread.map_or(String::new(), |spread| as_text(&spread));
            let _ = writeln!(text, "{:40} {median:>8}{range}", ratio.label);
        }
        for (what, reason) in self.missing {
            let _ = writeln!(text, "{what}: not measured: {reason}");
        }
        text
    }
}

fn as_text(&Spread { confidence, least, greatest, .. }: &Spread) -> String {
    let sure =
        confidence.map_or(String::new(), |(from, to)| format!("  95% sure: {from:.3} to {to:.3};"));
    format!("{sure}  rounds: {least:.3} to {greatest:.3}")
}

fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}
