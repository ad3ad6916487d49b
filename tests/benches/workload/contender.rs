//! Whoever runs a workload, and what each of its runs took.

use anyhow::{Context, Result};

/// What one run took. What a contender cannot tell is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    /// What the product itself reports: from the guest's first instruction to its end.
    pub(crate) guest_seconds: Option<f64>,
    /// From the start of the process to its end: what a user waits for.
    pub(crate) process_seconds: f64,
    /// The processor's time for the whole process, which other load disturbs less than the clock's.
    pub(crate) cpu_seconds: Option<f64>,
    /// The part of it that is user mode's, a guest's included.
    pub(crate) user_seconds: Option<f64>,
    pub(crate) instructions: Option<f64>,
    pub(crate) log_bytes: Option<f64>,
    pub(crate) trace_bytes: Option<f64>,
}

/// What several rounds came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    /// Where the median of very many rounds would lie, with a probability of 95% or more: two of the
    /// values. None from fewer rounds than tell.
    pub(crate) confidence: Option<(f64, f64)>,
    pub(crate) least: f64,
    pub(crate) greatest: f64,
}

/// One way to run one workload.
pub(crate) struct Contender {
    /// Its name in JSON.
    pub(crate) key: &'static str,
    /// Its name in the table.
    pub(crate) label: &'static str,
    once: Box<dyn FnMut() -> Result<Sample>>,
    samples: Vec<Sample>,
}

impl Contender {
    pub(crate) fn new(
        key: &'static str,
        label: &'static str,
        once: impl FnMut() -> Result<Sample> + 'static,
    ) -> Self {
        Self { key, label, once: Box::new(once), samples: Vec::new() }
    }

    fn run(&mut self) -> Result<()> {
        let sample = (self.once)().with_context(|| self.label)?;
        self.samples.push(sample);
        Ok(())
    }

    /// The median of what the samples have.
    pub(crate) fn median(&self, value: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(value).collect())
    }

    /// This contender's value by `other`'s in the same round: the median, since rounds that other load
    /// slows are to count no more than the rest, how sure it is, the least and the greatest.
    pub(crate) fn ratio(
        &self,
        other: &Self,
        value: impl Fn(&Sample) -> Option<f64>,
    ) -> Option<Spread> {
        let rounds = self.samples.iter().zip(&other.samples);
        let ratio = |(own, other)| Some(value(own)? / value(other)?);
        let mut ratios: Vec<f64> = rounds.filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let (least, greatest) = (*ratios.first()?, *ratios.last()?);
        let confidence = median_confidence(&ratios);
        Some(Spread { median: median(ratios)?, confidence, least, greatest })
    }
}

/// Runs each contender once a round; every other round goes backwards.
pub(crate) fn race(contenders: &mut [Contender], rounds: usize) -> Result<()> {
    for round in 0..rounds {
        eprintln!("{}: round {} of {rounds}", contenders[0].label, round + 1);
        let backwards = round % 2 == 1;
        for position in 0..contenders.len() {
            let index = if backwards { contenders.len() - 1 - position } else { position };
            contenders[index].run()?;
        }
    }
    Ok(())
}

/// The middle one; the mean of the two middle ones of an even number.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

/// The confidence interval of the median of sorted values, at 95%, whatever their distribution is. Each
/// value is below the true median as a tossed coin falls, so that median is below all but the `k` least
/// of `n` values only if `k` or fewer of `n` coins show heads; and likewise above.
fn median_confidence(sorted: &[f64]) -> Option<(f64, f64)> {
    const EITHER_SIDE: f64 = 0.025;
    let count = sorted.len();
    let mut exactly = 0.5f64.powi(i32::try_from(count).ok()?);
    let mut at_most = exactly;
    let mut outermost = None;
    for k in 0..count / 2 {
        if at_most > EITHER_SIDE {
            break;
        }
        outermost = Some(k);
        exactly *= (count - k) as f64 / (k + 1) as f64;
        at_most += exactly;
    }
    let k = outermost?;
    Some((sorted[k], sorted[count - 1 - k]))
}
