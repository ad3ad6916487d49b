//! Finds where two machines part, and looks at them there.

use std::collections::BTreeSet;

use iced_x86::Instruction;
use reprise_branch_clock::guest_code::{decode_at, linear_of};
use reprise_machine::ram::GuestRam;
use serde::Serialize;

use crate::cause::{Evidence, causes};
use crate::finding::{Finding, Kind, SideInfo};
use crate::image::Image;
use crate::interval::Counts;
use crate::listing::{Disassembler, Line};
use crate::memory::{PageDifference, PageTables, page_difference};
use crate::pair::Pair;
use crate::replica::{Depth, Look, Runner};
use crate::search::{BisectError, Gap, Search, Watch, evenly, ever_farther};
use crate::side::Side;
use crate::state_rows::{cpu_rows, flags, other_rows};
use crate::{Question, clock_differences, machine_differences};

/// Instructions listed before the place and behind it.
const LISTED: u64 = 8;
/// Pages of RAM that are described.
const SHOWN_PAGES: usize = 8;

/// What a comparison came to.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Where CPU or RAM differ first; else where devices and the like do. `None` if nothing was found.
    pub finding: Option<Box<Finding>>,
    /// Where devices, time or TLB differ that CPU and RAM show only at `finding`.
    pub origin: Option<Box<Finding>>,
    /// How it was compared.
    pub comparison: Comparison,
}

/// How two machines were compared.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Comparison {
    /// Instructions before the place where both replays began.
    pub from: u64,
    /// Instructions before the last place where they were compared and alike; CPU and RAM, if an origin was
    /// found or the clocks are not the same.
    pub equal_until: u64,
    /// Only CPU and RAM were compared, because the recordings' clocks are not the same.
    pub other_clocks: bool,
    /// How often they were compared.
    pub times: u64,
    /// How the replays ended that came to an end.
    pub endings: [Option<String>; 2],
    /// Which of them ended because they are not what was recorded.
    pub diverged: [bool; 2],
}

/// Compares.
pub(crate) struct Examiner<'a> {
    sides: &'a [Side<'a>; 2],
    question: &'a Question<'a>,
    search: Search<'a>,
    disassembler: Disassembler,
    machines: Vec<String>,
    /// Ticks and virtual time of the two cannot be compared.
    other_clocks: bool,
}

impl<'a> Examiner<'a> {
    pub(crate) fn new(
        sides: &'a [Side<'a>; 2],
        question: &'a Question<'a>,
        watch: &'a mut dyn Watch,
    ) -> Self {
        Self {
            sides,
            question,
            search: Search::new(sides, watch),
            disassembler: Disassembler::new(question.symbols.clone()),
            machines: machine_differences(sides),
            other_clocks: !clock_differences(sides).is_empty(),
        }
    }

    pub(crate) fn compare(mut self) -> Result<Compared, BisectError> {
        let mut pair = self.search.begin(self.question.starts)?;
        let from = pair.runners[0].instructions();
        let mut origin = None;
        if pair.differs(Depth::Everything)? {
            let visible = pair.differs(Depth::Visible)?;
            let finding = Some(Box::new(self.at_the_start(pair)?));
            if visible {
                return Ok(self.compared(from, from, finding, None));
            }
            origin = finding;
            pair = self.search.return_to(from)?;
        }
        let visible = origin.is_some() || self.other_clocks;
        let depth = if visible { Depth::Visible } else { Depth::Everything };
        let gap = self.first_gap(&mut pair, depth)?;
        let until = pair.runners[0].instructions();
        drop(pair);
        let Some(gap) = gap else {
            // Of two clocks' devices and times nothing follows while CPU and RAM are alike.
            let found = origin.filter(|_| !self.other_clocks);
            return Ok(self.compared(from, until, found, None));
        };
        let gap = self.search.narrow(gap, depth)?;
        if depth == Depth::Visible {
            let finding = Some(Box::new(self.examine(gap, depth)?));
            return Ok(self.compared(from, gap.equal, finding, origin));
        }
        self.go_on_from(gap, from)
    }

    /// Compares, from where both are alike, until they are not.
    fn first_gap(&mut self, pair: &mut Pair, depth: Depth) -> Result<Option<Gap>, BisectError> {
        let (here, until) = (pair.runners[0].tick(), self.question.until);
        let input = self.question.input.map(|input| input.tick()).filter(|_| !self.other_clocks);
        match input.filter(|input| (here..until).contains(input)) {
            // The same code on the same input does the same: the first comparison is where that ends.
            Some(input) => {
                if input > here
                    && let Some(gap) = self.search.scan_tick(pair, depth, input)?
                {
                    return Ok(Some(gap));
                }
                let from = pair.runners[0].instructions();
                self.search.scan(pair, depth, until, ever_farther(from, self.last_instruction()))
            }
            None => {
                let from = pair.runners[0].instructions();
                match self.last_instruction() {
                    // How many instructions there are, nobody knows yet.
                    u64::MAX => self.search.scan(pair, depth, until, ever_farther(from, u64::MAX)),
                    last => self.search.scan(pair, depth, until, evenly(from, last.max(from))),
                }
            }
        }
    }

    /// The instruction behind which nothing is compared; [`u64::MAX`] where that is not known.
    fn last_instruction(&self) -> u64 {
        let counts = |side: &Side<'_>| Counts::of(side.replayable()) == Counts::Instructions;
        if self.sides.iter().all(counts) { self.question.until } else { u64::MAX }
    }

    /// How the two differ at a tick, which at least one of them has to be brought to.
    pub(crate) fn at(mut self, tick: u64) -> Result<Finding, BisectError> {
        let mut pair = Pair::begin(self.sides, self.question.starts)?;
        self.search.advance_to_tick(&mut pair, tick)?;
        let mut lines = Pair::begin(self.sides, self.question.starts)?;
        self.search.advance_to_tick(&mut lines, tick)?;
        self.not_alike(pair, lines)
    }

    /// Everything is alike up to a gap: finds where CPU and RAM are not.
    fn go_on_from(mut self, gap: Gap, from: u64) -> Result<Compared, BisectError> {
        let mut pair = self.search.return_to(gap.equal)?;
        self.search.advance(&mut pair, gap.differs)?;
        let origin = Some(Box::new(self.examine(gap, Depth::Everything)?));
        if pair.differs(Depth::Visible)? {
            return Ok(self.compared(from, gap.equal, origin, None));
        }
        let places = ever_farther(gap.differs, self.last_instruction());
        let until = self.question.until;
        let visible = self.search.scan(&mut pair, Depth::Visible, until, places)?;
        let until = pair.runners[0].instructions();
        drop(pair);
        let Some(gap) = visible else { return Ok(self.compared(from, until, origin, None)) };
        let gap = self.search.narrow(gap, Depth::Visible)?;
        let finding = Some(Box::new(self.examine(gap, Depth::Visible)?));
        Ok(self.compared(from, gap.equal, finding, origin))
    }

    fn compared(
        self,
        from: u64,
        equal_until: u64,
        finding: Option<Box<Finding>>,
        origin: Option<Box<Finding>>,
    ) -> Compared {
        let over = self.search.over;
        let diverged = over.each_ref().map(|over| over.as_ref().is_some_and(|over| over.diverged));
        let endings = over.map(|over| over.map(|over| over.text));
        let ended =
            finding.as_ref().is_none_or(|finding| finding.endings.iter().any(Option::is_some));
        let endings = if ended { endings } else { [None, None] };
        let diverged = if ended { diverged } else { [false; 2] };
        let times = self.search.comparisons;
        let other_clocks = self.other_clocks;
        let comparison = Comparison { from, equal_until, other_clocks, times, endings, diverged };
        Compared { finding, origin, comparison }
    }

    /// Both machines where they begin, which are not alike.
    fn at_the_start(&mut self, pair: Pair) -> Result<Finding, BisectError> {
        let lines = Pair::begin(self.sides, self.question.starts)?;
        self.not_alike(pair, lines)
    }

    /// Two machines that are not alike where they stand; `lines` are the same once more.
    fn not_alike(&mut self, mut pair: Pair, mut lines: Pair) -> Result<Finding, BisectError> {
        let looks = pair.looks()?;
        let common = self.search.newest_image();
        let images = [0, 1].map(|side| pair.image_of(side, &common));
        let stages = [looks.clone(), looks.clone(), looks];
        lines.forget_changes();
        let listings = self.listings(&mut lines, &images)?;
        self.finding(Kind::Start, &stages, &images, pair, (Vec::new(), listings))
    }

    /// Looks at a step after which they are not alike, as far as `depth` goes.
    fn examine(&mut self, gap: Gap, depth: Depth) -> Result<Finding, BisectError> {
        let (mut pair, before) = self.search.looks_at(gap.equal)?;
        let common = self.search.newest().image.clone();
        let images_before = [0, 1].map(|side| pair.image_of(side, &common));
        for runner in &mut pair.runners {
            runner.enter()?;
        }
        let entered = pair.looks()?;
        let entering = pair.differs(depth)?;
        let entered_images = [0, 1].map(|side| pair.image_of(side, &common));
        if !entering {
            self.search.advance(&mut pair, gap.differs)?;
        }
        let after = pair.looks()?;
        let kind = if entering { Kind::Entering } else { Kind::Instruction };
        let listed_before = self.before(gap.equal, &images_before[0])?;
        let mut lines = self.search.return_to(gap.equal)?;
        let listings = self.listings(&mut lines, &images_before)?;
        let stages = [before, entered, after];
        self.finding(kind, &stages, &entered_images, pair, (listed_before, listings))
    }

    /// What differs, and why.
    fn finding(
        &mut self,
        kind: Kind,
        stages: &[[Look; 2]; 3],
        images: &[Image; 2],
        mut pair: Pair,
        (before, behind): (Vec<Line>, [Vec<Line>; 2]),
    ) -> Result<Finding, BisectError> {
        let [looks_before, entered, after] = stages;
        let rams = self.rams(images)?;
        let instructions: [Option<Instruction>; 2] = [0, 1].map(|side: usize| {
            let cpu = &entered[side].cpu;
            decode_at(&rams[side], cpu, cpu.rip)
        });
        let (memory, pages) = self.memory(&mut pair, &rams, after);
        let endings = [0, 1].map(|side| pair.runners[side].over().map(|over| over.text.clone()));
        let contradicted = pair.runners.iter().zip(self.sides).find_map(|(runner, side)| {
            let over = runner.over().filter(|over| over.diverged)?;
            Some((side.name.as_str(), over.text.as_str()))
        });
        let taken = |side: usize| {
            let count = |look: &Look| look.surroundings.interrupts;
            count(&entered[side]) - count(&looks_before[side])
        };
        let names = self.sides.each_ref().map(|side| side.name.as_str());
        let recording =
            self.sides.each_ref().map(|side| std::ptr::from_ref(side.replayable()).addr());
        let evidence = Evidence {
            names,
            machines: &self.machines,
            clocks_set: self
                .sides
                .each_ref()
                .map(|side| side.replayable().recording().header().machine.rtc_start_s),
            from_the_start: kind == Kind::Start,
            entering: kind == Kind::Entering,
            before: looks_before,
            entered,
            after,
            instructions,
            other_code: instructions[0] != instructions[1],
            pages: &memory,
            more_pages: pages > memory.len(),
            input: self.question.input.filter(|_| !self.other_clocks),
            typed: self.question.typed,
            other_clocks: self.other_clocks,
            contradicted,
            other_engines: recording[0] == recording[1],
        };
        let (cpu, first) = (&entered[0].cpu, behind[0].first());
        Ok(Finding {
            kind,
            sides: [0, 1].map(|side: usize| self.side_info(side, &looks_before[side], taken(side))),
            instructions: looks_before[0].instructions,
            address: linear_of(cpu, cpu.rip),
            symbol: self.question.symbols.describe(linear_of(cpu, cpu.rip)),
            instruction: first.map(|line| line.text.clone()).unwrap_or_default(),
            cpl: cpu.cpl(),
            cr3: cpu.cr3,
            rflags: flags(looks_before[0].cpu.rflags),
            cpu: cpu_rows(&after[0].cpu, &after[1].cpu),
            other: other_rows(&after[0], &after[1]),
            causes: causes(&evidence),
            memory,
            pages,
            before,
            behind,
            endings,
            other_clocks: self.other_clocks,
        })
    }

    fn side_info(&self, side: usize, before: &Look, interrupts: u64) -> SideInfo {
        let header = self.sides[side].replayable().recording().header();
        SideInfo {
            name: self.sides[side].name.clone(),
            engine: header.engine.clone(),
            clock: header.clock.clone(),
            tick: before.tick,
            virtual_ns: before.surroundings.virtual_ns,
            interrupts,
        }
    }

    fn rams(&self, images: &[Image; 2]) -> Result<[GuestRam; 2], BisectError> {
        Ok([images[0].to_ram(self.sides[0].ram_mib())?, images[1].to_ram(self.sides[1].ram_mib())?])
    }

    /// The first pages of RAM that differ now, and how many there are.
    fn memory(
        &self,
        pair: &mut Pair,
        rams: &[GuestRam; 2],
        after: &[Look; 2],
    ) -> (Vec<PageDifference>, usize) {
        let differing = pair.differing_pages(SHOWN_PAGES);
        if differing.is_empty() {
            return (Vec::new(), 0);
        }
        let tables = PageTables::of(&rams[0], &after[0].cpu);
        let described = differing.iter().filter_map(|&address| {
            let [one, other] = &mut pair.runners;
            let (one, other) = (one.page(address), other.page(address));
            page_difference(address, [&one, &other], &tables)
        });
        let described = described.collect();
        (described, pair.count_differing_pages())
    }

    /// What ran before an instruction, on both sides.
    fn before(&mut self, instruction: u64, image: &Image) -> Result<Vec<Line>, BisectError> {
        let mut pair = self.search.return_before(instruction, LISTED)?;
        let mut ram = image.to_ram(self.sides[0].ram_mib())?;
        let here = pair.runners[0].instructions();
        self.list(&mut pair.runners[0], &mut ram, instruction - here)
    }

    /// What both execute from where they stand.
    fn listings(
        &mut self,
        pair: &mut Pair,
        images: &[Image; 2],
    ) -> Result<[Vec<Line>; 2], BisectError> {
        let [mut one, mut other] = self.rams(images)?;
        let [a, b] = &mut pair.runners;
        Ok([self.list(a, &mut one, LISTED)?, self.list(b, &mut other, LISTED)?])
    }

    /// The next instructions of a machine, whose RAM `ram` is and becomes.
    fn list(
        &mut self,
        runner: &mut Runner,
        ram: &mut GuestRam,
        count: u64,
    ) -> Result<Vec<Line>, BisectError> {
        let mut lines = Vec::new();
        for _ in 0..count {
            let interrupts = runner.look()?.surroundings.interrupts;
            runner.enter()?;
            if runner.over().is_some() {
                break;
            }
            let mut changed = BTreeSet::new();
            runner.add_changed_pages(&mut changed);
            for page in changed {
                // It comes from RAM of the same size.
                let placed = ram.place(page, &runner.page(page)[..]);
                debug_assert!(placed, "page {page:#x} lies in RAM");
            }
            let look = runner.look()?;
            let mut line = self.disassembler.line(ram, look.instructions, &look.cpu);
            let taken = look.surroundings.interrupts - interrupts;
            line.note = (taken > 0).then(|| "an interrupt was taken right before".to_owned());
            lines.push(line);
            runner.advance(look.instructions + 1)?;
        }
        Ok(lines)
    }
}
