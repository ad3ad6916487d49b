//! The Gregorian calendar, for the clock chip.

/// A calendar day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Date {
    /// 0 to 9999.
    pub(crate) year: u32,
    /// 1 to 12.
    pub(crate) month: u32,
    /// 1 to 31.
    pub(crate) day: u32,
}

/// Days in 400 years, after which the calendar repeats.
const DAYS_IN_CYCLE: u32 = 146_097;
/// Years before the year 10000.
const YEARS: u32 = 10_000;
/// The day number of 1970-01-01.
const UNIX_EPOCH_DAY: u32 = Date { year: 1970, month: 1, day: 1 }.day_number();

impl Date {
    /// Days since 0000-03-01 plus a cycle, so that January and February of year 0 count too. Leap
    /// days are the last of years that start in March.
    const fn day_number(self) -> u32 {
        let months = (self.month + 9) % 12;
        let year = self.year + 400 - if self.month <= 2 { 1 } else { 0 };
        let days_before_month = (months * 306 + 5) / 10;
        year_start(year) + days_before_month + self.day - 1
    }

    /// The inverse of [`Date::day_number`]; years wrap after 9999.
    fn from_day_number(number: u32) -> Self {
        // Never too late a guess, and at most one year early.
        let mut year = (u64::from(number) * 400 / u64::from(DAYS_IN_CYCLE)) as u32;
        if year_start(year) > number {
            year -= 1;
        } else if year_start(year + 1) <= number {
            year += 1;
        }
        let day_of_year = number - year_start(year);
        let months = (day_of_year * 10 + 5) / 306;
        let day = day_of_year - (months * 306 + 5) / 10 + 1;
        let month = if months < 10 { months + 3 } else { months - 9 };
        let year = (year + u32::from(month <= 2) + YEARS - 400) % YEARS;
        Self { year, month, day }
    }

    /// The date `days` later; years wrap after 9999.
    pub(crate) fn after(self, days: u64) -> Self {
        let days_in_all_years = u64::from(YEARS / 400 * DAYS_IN_CYCLE);
        let number = u64::from(self.day_number()) + days % days_in_all_years;
        Self::from_day_number(number as u32)
    }

    /// The date at midnight after `days` days of Unix time.
    pub(crate) fn from_unix_days(days: u64) -> Self {
        Self { year: 1970, month: 1, day: 1 }.after(days)
    }

    /// 0 for Sunday.
    pub(crate) fn day_of_week(self) -> u32 {
        // 1970-01-01 was a Thursday; a cycle has whole weeks.
        (self.day_number() + 4 + 7 * DAYS_IN_CYCLE - UNIX_EPOCH_DAY) % 7
    }

    /// The nearest date that exists to what may be none.
    pub(crate) fn nearest(year: u32, month: u32, day: u32) -> Self {
        let (year, month) = (year.min(YEARS - 1), month.clamp(1, 12));
        let leap =
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let last = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        Self { year, month, day: day.clamp(1, last) }
    }
}

/// The number of the first of March of a year.
const fn year_start(year: u32) -> u32 {
    year * 365 + year / 4 - year / 100 + year / 400
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_ten_thousand_years_follows_the_day_before() {
        let mut date = Date { year: 0, month: 1, day: 1 };
        let mut day_of_week = date.day_of_week();
        for _ in 0..YEARS / 400 * DAYS_IN_CYCLE {
            let next = date.after(1);
            let expected = if Date::nearest(date.year, date.month, date.day + 1) != date {
                Date { day: date.day + 1, ..date }
            } else if date.month < 12 {
                Date { month: date.month + 1, day: 1, ..date }
            } else {
                Date { year: (date.year + 1) % YEARS, month: 1, day: 1 }
            };
            assert_eq!(next, expected, "after {date:?}");
            date = next;
            day_of_week = (day_of_week + 1) % 7;
            assert_eq!(date.day_of_week(), day_of_week, "{date:?}");
        }
        assert_eq!(date, Date { year: 0, month: 1, day: 1 });
    }

    #[test]
    fn unix_days_are_known_dates() {
        let cases = [
            (0, (1970, 1, 1), 4),
            (11_016, (2000, 2, 29), 2),
            (20_454, (2026, 1, 1), 4),
            (24_837, (2038, 1, 1), 5),
        ];
        for (days, (year, month, day), day_of_week) in cases {
            let date = Date::from_unix_days(days);
            assert_eq!(date, Date { year, month, day });
            assert_eq!(date.day_of_week(), day_of_week);
        }
    }

    #[test]
    fn days_that_do_not_exist_become_the_nearest() {
        assert_eq!(Date::nearest(2026, 2, 31), Date { year: 2026, month: 2, day: 28 });
        assert_eq!(Date::nearest(2024, 2, 31), Date { year: 2024, month: 2, day: 29 });
        assert_eq!(Date::nearest(20_000, 0, 0), Date { year: 9999, month: 1, day: 1 });
    }
}
