//! Shares of one expansion become the very trace that is made in one go, and nothing else does.

use std::io::Cursor;

use reprise_trace::instructions::filter::{Filter, LeftOut, Privilege, Selection};
use reprise_trace::instructions::{
    Concat, Event, Feed, Observer, Position, Run, SegmentOptions, Share, TraceError, TraceHeader,
    TraceReader, TraceWriter, joined_header,
};

use crate::account::header;
use crate::synthetic::{Options, Synthetic};

/// Passes runs and events on, but not where pieces begin and end, and keeps the position.
struct Piece<'a, O> {
    observer: &'a mut O,
    position: Position,
}

impl<O: Observer> Observer for Piece<'_, O> {
    fn new_blocks(&mut self) {
        self.observer.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.position.pass_run(run);
        self.observer.run(run)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.position.pass_event(event);
        self.observer.event(event)
    }
}

/// A trace made in one go, and the same in shares.
struct Divided {
    whole: Vec<u8>,
    shares: Vec<Vec<u8>>,
}

const SEGMENTS: SegmentOptions = SegmentOptions { instructions: 4_000, level: 1 };

/// As an expansion works: from one checkpoint to the next, each with a filter and segments of its own.
fn divide(selection: &Selection, header: &TraceHeader, count: u32) -> Divided {
    let options = Options::with_everything(6);
    let mut machine = Synthetic::new(options);
    let mut feed = Feed::new(options.contents);
    let mut position = Position { cr3: machine.cr3(), ..Position::default() };
    let mut whole = TraceWriter::create(Vec::new(), header, SEGMENTS).expect("writes");
    whole.begin(&position).expect("begins");
    let (mut shares, mut left_out) = (Vec::new(), LeftOut::default());
    for number in 1..=count {
        let batch = machine.advance(10_000);
        let (first_tick, end_tick) = (position.instruction, machine.instructions);
        let end_instruction = Some(end_tick);
        let share = Some(Share { number, count, first_tick, end_tick, end_instruction });
        let header = TraceHeader { share, ..header.clone() };
        let mut share = TraceWriter::create(Vec::new(), &header, SEGMENTS).expect("writes");
        share.begin(&position).expect("begins");
        let mut both = (&mut share, &mut whole);
        let piece = Piece { observer: &mut both, position };
        let mut filter = Filter::new(selection.clone(), piece);
        filter.begin(&position).expect("begins");
        feed.push(&batch, &mut filter).expect("keeps the contract");
        filter.end().expect("ends");
        let notes = filter.left_out().notes();
        assert!(notes.iter().all(|note| left_out.add_note(note)), "{notes:?}");
        position = filter.into_observer().position;
        share.cut().expect("writes");
        whole.cut().expect("writes");
        shares.push(share.finish(&notes).expect("finishes"));
    }
    Divided { whole: whole.finish(&left_out.notes()).expect("finishes"), shares }
}

fn join(shares: &[&[u8]]) -> Result<Vec<u8>, TraceError> {
    let open = |share: &&[u8]| TraceReader::open(Cursor::new(share.to_vec()));
    let mut readers = shares.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let headers: Vec<_> = readers.iter().map(|one| one.header().clone()).collect();
    let header = joined_header(&headers).map_err(|(_, error)| error)?;
    let mut joined = Concat::create(Vec::new(), header)?;
    readers.iter_mut().try_for_each(|share| joined.append(share))?;
    joined.finish()
}

#[test]
fn shares_become_the_trace_that_is_made_in_one_go() {
    let user = Selection { privilege: Some(Privilege::User), ..Selection::default() };
    let window = Selection { instructions: Some(12_000..18_000), ..Selection::default() };
    for selection in [Selection::default(), user, window] {
        let contents = Options::with_everything(6).contents;
        let divided = divide(&selection, &header(contents), 3);
        let shares: Vec<&[u8]> = divided.shares.iter().map(Vec::as_slice).collect();
        let joined = join(&shares).expect("they go together");
        assert!(joined == divided.whole, "{selection:?}");
        let single = divide(&selection, &header(contents), 1);
        assert!(join(&[&single.shares[0]]).expect("a share by itself") == single.whole);
    }
}

#[test]
fn what_does_not_go_together_is_refused_with_the_reason() {
    let plain = header(Options::with_everything(6).contents);
    let none = Selection::default();
    let Divided { whole, shares } = divide(&none, &plain, 3);
    let [first, second, third] = [&shares[0][..], &shares[1][..], &shares[2][..]];
    let other_header = TraceHeader { recording: "0e0e".into(), ..plain.clone() };
    let other = divide(&none, &other_header, 3).shares;
    let other_header = TraceHeader { filters: vec!["--user".into()], ..plain.clone() };
    let filtered = divide(&none, &other_header, 3).shares;
    let in_two = divide(&none, &plain, 2).shares;
    let cut = &second[..second.len() - 100];
    let mut damaged = second.to_vec();
    damaged[second.len() / 2] ^= 1;
    for (shares, reason) in [
        (&[][..], "there is none"),
        (&[first, third], "share 3 of 3 where share 2 is due"),
        (&[second, first, third], "share 2 of 3 where share 1 is due"),
        (&[first, second, second], "share 2 of 3 where share 3 is due"),
        (&[first, second], "share 3 of 3 is due"),
        (&[first, &other[1], third], "different recordings"),
        (&[first, &filtered[1], third], "different filters"),
        (&[first, &in_two[1]], "one of 2 shares"),
        (&[first, &whole, third], "no share"),
        (&[first, cut, third], "cut short"),
        (&[first, &damaged, third], "damaged"),
    ] {
        let error = join(shares).expect_err(reason).to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

/// A share with this place in the expansion and nothing in it.
fn share(number: u32, count: u32, first_tick: u64, end_tick: u64) -> TraceHeader {
    let end_instruction = Some(end_tick);
    let share = Some(Share { number, count, first_tick, end_tick, end_instruction });
    TraceHeader { share, ..header(Options::new(1).contents) }
}

#[test]
fn gaps_and_overlaps_are_told_by_the_headers() {
    let fits = [share(1, 3, 5, 10), share(2, 3, 10, 10), share(3, 3, 10, 30)];
    assert_eq!(joined_header(&fits).expect("they fit").share, None);
    for (second, reason) in [(share(2, 2, 11, 20), "begins at tick 11"), (share(2, 2, 9, 20), "9")]
    {
        let (index, error) = joined_header(&[share(1, 2, 5, 10), second]).expect_err(reason);
        assert!(index == 1 && error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_share_that_was_stopped_is_no_share() {
    // It ends before the tick that its header promises.
    let writer = TraceWriter::create(Vec::new(), &share(1, 1, 0, 100), SEGMENTS).expect("writes");
    let file = writer.finish(&["stopped early".into()]).expect("finishes");
    let error = join(&[&file]).expect_err("it lacks something").to_string();
    assert!(error.contains("ends at instruction 0, and its share at 100"), "{error}");
    // Where its ticks are no instructions it promises nothing.
    let mut header = share(1, 1, 0, 100);
    header.share.as_mut().expect("it is one").end_instruction = None;
    let writer = TraceWriter::create(Vec::new(), &header, SEGMENTS).expect("writes");
    join(&[&writer.finish(&[]).expect("finishes")]).expect("it may end there");
}
