//! RDTSC that was to be trapped and was not: before a run only the kernel's file is known.

use reprise_trace::header::{Precaution, Treatment};

use super::TrapCounts;

const KERNEL_MOVED: &str = "not trapped: the kernel was not seen to be entered behind its boot stub; if it ran at all, add nokaslr to its \
     command line, or use --engine soft";
const PLACES_LEFT: &str = "not trapped everywhere: places of the kernel's text do not hold what its file says; use --engine soft";
const UNGUARDED: &str = "refused and not answered: the kernel's handler of #GP was not found while programs ran, and one that reads the \
     counter got a fault; use --engine soft";

/// By what the trap did; `None` if it never saw the kernel.
pub(super) fn by_counts(counts: Option<TrapCounts>) -> Vec<Precaution> {
    let (kernel, user) = (Precaution::KERNEL_TIME_STAMPS, Precaution::USER_TIME_STAMPS);
    let found = match counts {
        None => [Some((kernel, KERNEL_MOVED)), Some((user, KERNEL_MOVED))],
        Some(TrapCounts { refused, unguarded, .. }) => [
            (refused > 0).then_some((kernel, PLACES_LEFT)),
            (unguarded > 0).then_some((user, UNGUARDED)),
        ],
    };
    let open = |(what, how): (&str, &str)| Precaution {
        what: what.to_owned(),
        treatment: Treatment::Open,
        how: how.to_owned(),
    };
    found.into_iter().flatten().map(open).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_code_is_told_of_once() {
        let all = TrapCounts { kernel: 5, user: 3, open: 2, unforeseen: 1, ..Default::default() };
        let (kernel, user) = (Precaution::KERNEL_TIME_STAMPS, Precaution::USER_TIME_STAMPS);
        for (counts, expected) in [
            (None, &[kernel, user][..]),
            (Some(all), &[]),
            (Some(TrapCounts { refused: 1, ..all }), &[kernel]),
            (Some(TrapCounts { unguarded: 9, ..all }), &[user]),
            (Some(TrapCounts { refused: 1, unguarded: 9, ..all }), &[kernel, user]),
        ] {
            let told = by_counts(counts);
            let what: Vec<_> = told.iter().map(|it| &it.what[..]).collect();
            assert_eq!(what, expected);
            for Precaution { how, treatment, .. } in told {
                assert!(!how.contains('\n') && how.contains("--engine soft"), "{how}");
                assert_eq!(treatment, Treatment::Open);
            }
        }
    }
}
