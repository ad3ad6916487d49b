//! The recording log: one record for each thing that entered the machine. `FORMAT.md` describes the
//! bytes. Records are grouped into frames, and nothing that decodes a record reaches across a frame,
//! so frames decode independently.

use std::collections::VecDeque;
use std::io;

use crate::event::{Assists, EffectDigest, Ending, Event, HandOver, MarkDigest, Record};
use crate::frame::{Damage, FrameFault, MAX_FRAME_BYTES};
use crate::header::{Precaution, Treatment};
use crate::logged::Logged;
use crate::moment::{Moment, TickKind};
use crate::varint::{TakeError, Taker, put, put_difference};

/// A frame is cut when its records have this many bytes, uncompressed.
pub const FRAME_BYTES: usize = 64 << 10;
/// The longest record, in bytes: a frame of anything pending and this record stays below
/// [`MAX_FRAME_BYTES`].
pub const MAX_RECORD_BYTES: usize = MAX_FRAME_BYTES as usize - FRAME_BYTES;

/// Why the log cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Writing failed.
    #[error("the recording cannot be written: {0}; what was written before replays")]
    Write(io::Error),
    /// Reading failed.
    #[error("the recording cannot be read: {0}; see that its file is there and whole")]
    Read(io::Error),
    /// An earlier write failed: the file may end in part of a frame, so nothing may follow.
    #[error("the recording is closed, because an earlier write to it failed")]
    Closed,
    /// A single record is larger than a frame may be.
    #[error("a record of {bytes} bytes is too large for the log: at most {MAX_RECORD_BYTES} fit")]
    RecordTooLarge {
        /// Its encoded length.
        bytes: usize,
    },
    /// Moments only go forward.
    #[error("a record at tick {tick} cannot follow one at tick {previous}: report this as a bug")]
    TickGoesBack {
        /// The tick of the record before.
        previous: u64,
        /// The tick of the record refused.
        tick: u64,
    },
    /// The log ends before a place that was asked for.
    #[error("the log has not {records} records: take another copy of the recording")]
    TooShort {
        /// The records asked for.
        records: u64,
    },
    /// Frames were written out of order.
    #[error("{0}: report this as a bug")]
    OutOfPlace(&'static str),
    /// The recording is damaged. Everything before this frame was sound and has been read.
    #[error("{0}; use what replays before it, or take another copy of the recording")]
    Damaged(#[from] Damage),
}

/// Takes whole frames of encoded records.
pub trait FrameSink {
    /// Takes one whole frame of encoded records.
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError>;
}

impl<S: FrameSink + ?Sized> FrameSink for Box<S> {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        (**self).write_frame(records, record_count)
    }
}

/// Forgets the log: a run without recording.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardSink;

impl FrameSink for DiscardSink {
    fn write_frame(&mut self, _records: Vec<u8>, _record_count: u32) -> Result<(), LogError> {
        Ok(())
    }
}

/// Keeps the log in memory: for tests that record and replay without a file.
#[derive(Clone, Debug, Default)]
pub struct MemorySink {
    frames: VecDeque<LogFrame>,
}

impl MemorySink {
    /// Reads what was written.
    pub fn into_reader(self) -> LogReader {
        LogReader::new(Box::new(MemorySource { frames: self.frames }))
    }

    /// How many frames were written.
    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }
}

impl FrameSink for MemorySink {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        let frame = self.frames.len() as u64;
        self.frames.push_back(LogFrame { records, record_count, frame, offset: 0 });
        Ok(())
    }
}

/// What differences are taken to; all zero at a frame's start.
#[derive(Clone, Copy, Debug, Default)]
struct Previous {
    tick: u64,
    rip: u64,
    rcx: u64,
    ns: u64,
    console_bytes: u64,
}

// A record's first byte: the event in the low bits, then what has not changed.
const EVENT_MASK: u8 = 0x07;
const EVENT_CONSOLE: u8 = 0;
const EVENT_TIME: u8 = 1;
const EVENT_CLOCK_READ: u8 = 2;
const EVENT_MARK: u8 = 3;
const EVENT_END: u8 = 4;
const EVENT_HAND_OVER: u8 = 5;
const EVENT_ASSISTS: u8 = 6;
const EVENT_LEFT_OPEN: u8 = 7;
const SAME_RIP: u8 = 0x08;
const SAME_RCX: u8 = 0x10;

// What a tick is, in a hand-over.
const TICK_INSTRUCTION: u8 = 0;
const TICK_CONDITIONAL_BRANCH: u8 = 1;
const TICK_EXIT: u8 = 2;

// An ending's first byte.
const ENDING_RESET: u8 = 0;
const ENDING_TRIPLE_FAULT: u8 = 1;
const ENDING_POWER_OFF: u8 = 2;
const ENDING_IDLE_FOREVER: u8 = 3;
const ENDING_DEBUG_EXIT: u8 = 4;
const ENDING_STOPPED: u8 = 5;
const ENDING_ENGINE_FAILED: u8 = 6;

impl Previous {
    /// Appends `record`, whose tick is not below the previous one.
    fn encode(&mut self, out: &mut Vec<u8>, record: &Record) {
        let Moment { tick, rip, rcx } = record.moment;
        let mut first = match record.event {
            Event::Console(_) => EVENT_CONSOLE,
            Event::Time(_) => EVENT_TIME,
            Event::ClockRead(_) => EVENT_CLOCK_READ,
            Event::Mark(_) => EVENT_MARK,
            Event::End { .. } => EVENT_END,
            Event::HandOver(_) => EVENT_HAND_OVER,
            Event::Assists(_) => EVENT_ASSISTS,
            Event::LeftOpen(_) => EVENT_LEFT_OPEN,
        };
        first |= if rip == self.rip { SAME_RIP } else { 0 };
        first |= if rcx == self.rcx { SAME_RCX } else { 0 };
        out.push(first);
        put(out, tick - self.tick);
        if rip != self.rip {
            put_difference(out, self.rip, rip);
        }
        if rcx != self.rcx {
            put_difference(out, self.rcx, rcx);
        }
        out.extend_from_slice(&record.cpu_digest.to_le_bytes());
        (self.tick, self.rip, self.rcx) = (tick, rip, rcx);
        self.encode_event(out, &record.event);
    }

    fn encode_event(&mut self, out: &mut Vec<u8>, event: &Event) {
        match event {
            Event::Console(bytes) => put_bytes(out, bytes),
            Event::Time(ns) | Event::ClockRead(ns) => {
                put_difference(out, self.ns, *ns);
                self.ns = *ns;
            }
            Event::Mark(mark) => {
                put_difference(out, self.console_bytes, mark.console_bytes);
                self.console_bytes = mark.console_bytes;
                out.extend_from_slice(&mark.console_digest_prefix.to_le_bytes());
            }
            Event::HandOver(to) => encode_hand_over(out, to),
            Event::Assists(assists) => {
                put(out, assists.len() as u64);
                for (mnemonic, count) in assists {
                    put_bytes(out, mnemonic.as_bytes());
                    put(out, *count);
                }
            }
            Event::LeftOpen(left) => {
                put(out, left.len() as u64);
                for Precaution { what, treatment: _, how } in left {
                    put_bytes(out, what.as_bytes());
                    put_bytes(out, how.as_bytes());
                }
            }
            Event::End { ending, effects, final_digest } => {
                encode_ending(out, ending);
                put(out, effects.console_bytes);
                out.extend_from_slice(&effects.console_digest);
                out.push(u8::from(final_digest.is_some()));
                out.extend_from_slice(final_digest.as_ref().map_or(&[], |digest| &digest[..]));
            }
        }
    }

    /// Takes the next record.
    fn decode(&mut self, taker: &mut Taker<'_>) -> Result<Record, Malformed> {
        let first = taker.byte()?;
        if first & !(EVENT_MASK | SAME_RIP | SAME_RCX) != 0 {
            return Err(Malformed);
        }
        self.tick = self.tick.checked_add(taker.varint()?).ok_or(Malformed)?;
        if first & SAME_RIP == 0 {
            self.rip = taker.difference(self.rip)?;
        }
        if first & SAME_RCX == 0 {
            self.rcx = taker.difference(self.rcx)?;
        }
        let cpu_digest = taker.fixed_u64()?;
        let event = self.decode_event(first & EVENT_MASK, taker)?;
        let moment = Moment { tick: self.tick, rip: self.rip, rcx: self.rcx };
        Ok(Record { moment, cpu_digest, event })
    }

    fn decode_event(&mut self, event: u8, taker: &mut Taker<'_>) -> Result<Event, Malformed> {
        match event {
            EVENT_CONSOLE => Ok(Event::Console(take_bytes(taker)?.to_vec())),
            EVENT_TIME | EVENT_CLOCK_READ => {
                self.ns = taker.difference(self.ns)?;
                let is_time = event == EVENT_TIME;
                Ok(if is_time { Event::Time(self.ns) } else { Event::ClockRead(self.ns) })
            }
            EVENT_MARK => {
                self.console_bytes = taker.difference(self.console_bytes)?;
                Ok(Event::Mark(MarkDigest {
                    console_bytes: self.console_bytes,
                    console_digest_prefix: taker.fixed_u64()?,
                }))
            }
            EVENT_HAND_OVER => Ok(Event::HandOver(decode_hand_over(taker)?)),
            EVENT_ASSISTS => Ok(Event::Assists(decode_assists(taker)?)),
            EVENT_LEFT_OPEN => Ok(Event::LeftOpen(decode_left_open(taker)?)),
            EVENT_END => Ok(Event::End {
                ending: decode_ending(taker)?,
                effects: EffectDigest {
                    console_bytes: taker.varint()?,
                    console_digest: taker.array()?,
                },
                final_digest: match taker.byte()? {
                    0 => None,
                    1 => Some(taker.array()?),
                    _ => return Err(Malformed),
                },
            }),
            _ => Err(Malformed),
        }
    }
}

/// The bytes are no record.
struct Malformed;

impl From<TakeError> for Malformed {
    fn from(_: TakeError) -> Self {
        Self
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take_bytes<'a>(taker: &mut Taker<'a>) -> Result<&'a [u8], TakeError> {
    let count = taker.varint()?;
    taker.bytes(count)
}

fn take_text(taker: &mut Taker<'_>) -> Result<String, Malformed> {
    let text = std::str::from_utf8(take_bytes(taker)?).map_err(|_| Malformed)?;
    Ok(text.to_owned())
}

fn encode_hand_over(out: &mut Vec<u8>, to: &HandOver) {
    put_bytes(out, to.engine.as_bytes());
    put_bytes(out, to.clock.as_bytes());
    out.push(match to.tick_kind {
        TickKind::Instruction => TICK_INSTRUCTION,
        TickKind::ConditionalBranch => TICK_CONDITIONAL_BRANCH,
        TickKind::Exit => TICK_EXIT,
    });
    put(out, to.ns_per_tick);
}

fn decode_hand_over(taker: &mut Taker<'_>) -> Result<HandOver, Malformed> {
    Ok(HandOver {
        engine: take_text(taker)?,
        clock: take_text(taker)?,
        tick_kind: match taker.byte()? {
            TICK_INSTRUCTION => TickKind::Instruction,
            TICK_CONDITIONAL_BRANCH => TickKind::ConditionalBranch,
            TICK_EXIT => TickKind::Exit,
            _ => return Err(Malformed),
        },
        ns_per_tick: taker.varint()?,
    })
}

/// Mnemonics stand in their order, each once.
fn decode_assists(taker: &mut Taker<'_>) -> Result<Assists, Malformed> {
    let mut assists = Assists::new();
    for _ in 0..taker.varint()? {
        let (mnemonic, count) = (take_text(taker)?, taker.varint()?);
        if assists.last_key_value().is_some_and(|(last, _)| *last >= mnemonic) {
            return Err(Malformed);
        }
        assists.insert(mnemonic, count);
    }
    Ok(assists)
}

fn decode_left_open(taker: &mut Taker<'_>) -> Result<Vec<Precaution>, Malformed> {
    let mut left = Vec::new();
    for _ in 0..taker.varint()? {
        let (what, how) = (take_text(taker)?, take_text(taker)?);
        left.push(Precaution { what, treatment: Treatment::Open, how });
    }
    Ok(left)
}

fn encode_ending(out: &mut Vec<u8>, ending: &Ending) {
    match ending {
        Ending::Reset => out.push(ENDING_RESET),
        Ending::TripleFault => out.push(ENDING_TRIPLE_FAULT),
        Ending::PowerOff => out.push(ENDING_POWER_OFF),
        Ending::IdleForever => out.push(ENDING_IDLE_FOREVER),
        Ending::DebugExit(value) => out.extend_from_slice(&[ENDING_DEBUG_EXIT, *value]),
        Ending::Stopped => out.push(ENDING_STOPPED),
        Ending::EngineFailed(reason) => {
            out.push(ENDING_ENGINE_FAILED);
            put_bytes(out, reason.as_bytes());
        }
    }
}

fn decode_ending(taker: &mut Taker<'_>) -> Result<Ending, Malformed> {
    Ok(match taker.byte()? {
        ENDING_RESET => Ending::Reset,
        ENDING_TRIPLE_FAULT => Ending::TripleFault,
        ENDING_POWER_OFF => Ending::PowerOff,
        ENDING_IDLE_FOREVER => Ending::IdleForever,
        ENDING_DEBUG_EXIT => Ending::DebugExit(taker.byte()?),
        ENDING_STOPPED => Ending::Stopped,
        ENDING_ENGINE_FAILED => Ending::EngineFailed(take_text(taker)?),
        _ => return Err(Malformed),
    })
}

/// Appends records to the log and hands each back with the proof that it stands there.
#[derive(Debug)]
pub struct LogWriter<S: FrameSink> {
    sink: S,
    pending: Vec<u8>,
    pending_count: u32,
    previous: Previous,
    record_count: u64,
    last_tick: u64,
}

impl<S: FrameSink> LogWriter<S> {
    /// An empty log.
    pub fn new(sink: S) -> Self {
        Self {
            sink,
            pending: Vec::new(),
            pending_count: 0,
            previous: Previous::default(),
            record_count: 0,
            last_tick: 0,
        }
    }

    /// Appends a record; cuts a frame by itself once [`FRAME_BYTES`] are pending.
    ///
    /// # Errors
    /// If the record's tick is below the last one's, if it is larger than [`MAX_RECORD_BYTES`] (in
    /// both cases the log is as before), or if the sink fails.
    pub fn append(&mut self, record: Record) -> Result<Logged<Record>, LogError> {
        let tick = record.moment.tick;
        if tick < self.last_tick {
            return Err(LogError::TickGoesBack { previous: self.last_tick, tick });
        }
        let (start, before) = (self.pending.len(), self.previous);
        self.previous.encode(&mut self.pending, &record);
        let bytes = self.pending.len() - start;
        if bytes > MAX_RECORD_BYTES {
            self.pending.truncate(start);
            self.previous = before;
            return Err(LogError::RecordTooLarge { bytes });
        }
        self.pending_count += 1;
        self.record_count += 1;
        self.last_tick = tick;
        if self.pending.len() >= FRAME_BYTES {
            self.flush()?;
        }
        Ok(Logged::new(record))
    }

    /// Cuts a frame now if any record is pending.
    ///
    /// # Errors
    /// If the sink fails; the pending records are lost then.
    pub fn flush(&mut self) -> Result<(), LogError> {
        if self.pending_count == 0 {
            return Ok(());
        }
        self.previous = Previous::default();
        let count = std::mem::take(&mut self.pending_count);
        self.sink.write_frame(std::mem::take(&mut self.pending), count)
    }

    /// Records appended so far.
    pub fn record_count(&self) -> u64 {
        self.record_count
    }

    /// Where the frames go.
    pub fn sink(&self) -> &S {
        &self.sink
    }

    /// Cuts the last frame and gives the sink back.
    ///
    /// # Errors
    /// As [`LogWriter::flush`].
    pub fn finish(mut self) -> Result<S, LogError> {
        self.flush()?;
        Ok(self.sink)
    }
}

/// A frame of encoded records, and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct LogFrame {
    pub(crate) records: Vec<u8>,
    pub(crate) record_count: u32,
    /// As in [`Damage::frame`].
    pub(crate) frame: u64,
    /// As in [`Damage::offset`].
    pub(crate) offset: u64,
}

/// Where a reader's frames come from.
pub(crate) trait FrameSource: Send {
    /// The next frame; after an error the same error again, never a frame behind it.
    fn next_frame(&mut self) -> Result<Option<LogFrame>, LogError>;
}

struct MemorySource {
    frames: VecDeque<LogFrame>,
}

impl FrameSource for MemorySource {
    fn next_frame(&mut self) -> Result<Option<LogFrame>, LogError> {
        Ok(self.frames.pop_front())
    }
}

/// Streams the records of a log, frame by frame, in memory bounded by a frame's.
///
/// An error stays: after one, every call gives it again and no record follows.
pub struct LogReader {
    source: Box<dyn FrameSource>,
    frame: FrameDecoder,
    last_tick: u64,
    next: Option<Record>,
    damage: Option<Damage>,
}

impl std::fmt::Debug for LogReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogReader").field("next", &self.next).finish_non_exhaustive()
    }
}

impl LogReader {
    pub(crate) fn new(source: Box<dyn FrameSource>) -> Self {
        let frame = FrameDecoder::default();
        Self { source, frame, last_tick: 0, next: None, damage: None }
    }

    /// A log of these records, for tests: they go through the codec.
    ///
    /// # Panics
    /// If [`LogWriter::append`] would refuse one of them.
    pub fn from_records(records: Vec<Record>) -> Self {
        let mut log = LogWriter::new(MemorySink::default());
        for record in records {
            log.append(record).expect("a test's records can be logged");
        }
        log.finish().expect("memory takes every frame").into_reader()
    }

    /// The next record, which stays next. `None` at the log's end.
    ///
    /// # Errors
    /// If the recording cannot be read or is damaged here.
    pub fn peek(&mut self) -> Result<Option<&Record>, LogError> {
        if self.next.is_none() {
            self.next = self.decode_next()?;
        }
        Ok(self.next.as_ref())
    }

    /// The next record. `None` at the log's end.
    ///
    /// # Errors
    /// If the recording cannot be read or is damaged here.
    pub fn next_record(&mut self) -> Result<Option<Logged<Record>>, LogError> {
        self.peek()?;
        Ok(self.next.take().map(Logged::new))
    }

    fn decode_next(&mut self) -> Result<Option<Record>, LogError> {
        if let Some(damage) = &self.damage {
            return Err(damage.clone().into());
        }
        if self.frame.is_used_up() {
            match self.source.next_frame()? {
                Some(frame) => self.frame = FrameDecoder::new(frame),
                None => return Ok(None),
            }
        }
        let record = self.frame.next_record(self.last_tick);
        match &record {
            Ok(record) => self.last_tick = record.moment.tick,
            Err(damage) => self.damage = Some(damage.clone()),
        }
        Ok(Some(record?))
    }
}

/// Decodes one frame's records one after the other.
#[derive(Default)]
pub(crate) struct FrameDecoder {
    frame: Option<LogFrame>,
    position: usize,
    decoded_count: u32,
    previous: Previous,
}

impl FrameDecoder {
    pub(crate) fn new(frame: LogFrame) -> Self {
        Self { frame: Some(frame), ..Self::default() }
    }

    pub(crate) fn is_used_up(&self) -> bool {
        self.frame.as_ref().is_none_or(|frame| self.decoded_count == frame.record_count)
    }

    /// The next record of a frame that is not used up. Moments only go forward, so a tick below
    /// `last_tick` is damage as well; so are bytes behind the last record.
    pub(crate) fn next_record(&mut self, last_tick: u64) -> Result<Record, Damage> {
        let frame = self.frame.as_ref().expect("the frame is not used up");
        let damage = Damage {
            frame: frame.frame,
            offset: frame.offset,
            fault: FrameFault::Record(self.decoded_count),
        };
        let mut taker = Taker::new(&frame.records[self.position..]);
        let Ok(record) = self.previous.decode(&mut taker) else {
            return Err(damage);
        };
        self.position = frame.records.len() - taker.remaining();
        self.decoded_count += 1;
        let bytes_left_over = self.decoded_count == frame.record_count && taker.remaining() > 0;
        if record.moment.tick < last_tick || bytes_left_over {
            return Err(damage);
        }
        Ok(record)
    }
}
