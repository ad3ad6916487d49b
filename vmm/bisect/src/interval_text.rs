//! An interval as text: the headline, the likely cause, then what it rests on.

use std::fmt::{self, Display, Formatter, Write as _};

use crate::interval::{Checked, Interval};

impl Display for Interval {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.divergence.is_none() && self.at_checkpoint.is_none() {
            return f.write_str("the replay is what was recorded: there is nothing to narrow");
        }
        let mut text = String::new();
        let Self { from, to, .. } = self;
        let _ = writeln!(
            text,
            "replay and recording part behind tick {from}, at tick {to} at the latest: {} instructions",
            self.ran.instructions
        );
        self.write_causes(&mut text);
        text += "\nwhat is known of the recorded side:\n";
        self.write_known(&mut text);
        text += "\nwhat the replay ran there (instructions before, CPL, address, bytes):\n";
        self.write_ran(&mut text);
        if let Some(finding) = &self.at_checkpoint {
            let _ = writeln!(text, "\nthe recorded checkpoint and the replay there: {finding}");
        }
        self.write_engines(&mut text);
        f.write_str(text.trim_end())
    }
}

impl Interval {
    fn write_causes(&self, text: &mut String) {
        for (index, cause) in self.causes.iter().enumerate() {
            let which = if index == 0 { "likely cause" } else { "or" };
            let _ = writeln!(text, "{which}: {} ({})", cause.text, cause.name);
        }
        match self.causes.first() {
            Some(cause) => {
                let _ = writeln!(text, "next: {}", cause.next);
            }
            None => *text += "likely cause: none of those that Reprise knows\n",
        }
    }

    fn write_known(&self, text: &mut String) {
        match self.agreed {
            Some(agreed) => {
                let _ = writeln!(
                    text,
                    "  the CPU was last as recorded at record {}, tick {}",
                    agreed.record, agreed.tick
                );
            }
            None => *text += "  at no record was the CPU as recorded\n",
        }
        let alike = self.checkpoints.iter().filter(|checked| checked.differs_in.is_none()).count();
        if let Some(last) = alike.checked_sub(1) {
            let tick = self.checkpoints[last].tick;
            let _ = writeln!(
                text,
                "  all of the machine was as recorded at {alike} checkpoints, the last at tick {tick}"
            );
        }
        for Checked { tick, set_aside, .. } in &self.checkpoints {
            if !set_aside.is_empty() {
                let what = set_aside.join("; ");
                let _ = writeln!(text, "  at the checkpoint at tick {tick} set aside: {what}");
            }
        }
        for checked in &self.checkpoints {
            if let Some(parts) = &checked.differs_in {
                let _ = writeln!(
                    text,
                    "  not at the checkpoint at tick {}: {parts} differ",
                    checked.tick
                );
            }
        }
        if self.checkpoints.is_empty() {
            *text += "  there is no checkpoint to compare with: the closer `reprise record \
                      --checkpoint-every` sets them, the closer they narrow this\n";
        }
    }

    fn write_ran(&self, text: &mut String) {
        for line in &self.ran.first {
            let _ = writeln!(text, "    {line}");
        }
        let shown = (self.ran.first.len() + self.ran.last.len()) as u64;
        if self.ran.instructions > shown {
            let _ = writeln!(text, "    ... {} more ...", self.ran.instructions - shown);
        }
        for line in &self.ran.last {
            let _ = writeln!(text, "    {line}");
        }
        if let Some(line) = &self.around.next {
            let _ = writeln!(text, "  > {line}");
        }
        for interest in &self.ran.interest {
            let _ = writeln!(
                text,
                "  {}: {} of them, the first is instruction {} at {:#x}",
                interest.kind, interest.count, interest.instruction, interest.address
            );
        }
    }

    fn write_engines(&self, text: &mut String) {
        let Some(engines) = &self.engines else { return };
        let times = engines.comparison.times;
        match &engines.finding {
            None => {
                let _ = writeln!(
                    text,
                    "\ntranslated and interpreted execution are alike up to instruction {} (compared {times} \
                     times)",
                    engines.comparison.equal_until
                );
            }
            Some(finding) => {
                let _ = writeln!(text, "\ntranslated and interpreted execution part: {finding}");
            }
        }
    }
}
