//! Console output as a terminal may be shown it long after the guest wrote it.
//!
//! A guest that asks its terminal a question (ECMA-48's device status report, CSI n, and device attributes, CSI c:
//! a shell asks where the cursor is) has been answered when it was recorded. In a replay the terminal would answer
//! again, to whoever reads from it next.

use std::io::{self, Write};

const ESCAPE: u8 = 0x1b;
/// What begins a control sequence, behind ESC.
const INTRODUCER: u8 = b'[';
/// The last byte of a question.
const QUESTIONS: [u8; 2] = *b"nc";
/// Longer ones are none.
const MAX_SEQUENCE_BYTES: usize = 32;

/// Passes everything on but questions to the terminal.
#[derive(Debug)]
pub struct WithoutQueries<W> {
    to: W,
    /// The beginning of a control sequence whose end has not come.
    begun: Vec<u8>,
}

impl<W: Write> WithoutQueries<W> {
    /// In front of a terminal.
    pub fn new(to: W) -> Self {
        Self { to, begun: Vec::new() }
    }

    fn pass_on(&mut self, byte: u8, shown: &mut Vec<u8>) {
        self.begun.push(byte);
        match self.begun[..] {
            [ESCAPE] | [ESCAPE, INTRODUCER] => {}
            // Parameters and what stands between them and the last byte.
            [ESCAPE, INTRODUCER, .., 0x20..=0x3f] if self.begun.len() < MAX_SEQUENCE_BYTES => {}
            [ESCAPE, INTRODUCER, .., last] if QUESTIONS.contains(&last) => self.begun.clear(),
            // Another sequence begins before this one has ended.
            [ESCAPE, .., ESCAPE] => {
                self.begun.pop();
                shown.append(&mut self.begun);
                self.begun.push(ESCAPE);
            }
            _ => shown.append(&mut self.begun),
        }
    }
}

impl<W: Write> Write for WithoutQueries<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shown = Vec::with_capacity(bytes.len());
        for byte in bytes {
            self.pass_on(*byte, &mut shown);
        }
        self.to.write_all(&shown)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pieces: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut terminal = WithoutQueries::new(&mut out);
        for piece in pieces {
            terminal.write_all(piece).expect("a vector takes it");
        }
        out
    }

    #[test]
    fn questions_are_left_out_however_they_come_in_pieces() {
        let whole = b"/ # \x1b[6nls\r\n\x1b[1;34mbin\x1b[0m\x1b[0c\x1b[?6n \x1b[2J\x1bMend";
        let expected = b"/ # ls\r\n\x1b[1;34mbin\x1b[0m \x1b[2J\x1bMend";
        assert_eq!(shown(&[whole]), expected);
        let single: Vec<_> = whole.chunks(1).collect();
        assert_eq!(shown(&single), expected);
    }

    #[test]
    fn what_is_no_sequence_is_shown() {
        for text in [&b"\x1b\x1b[0m"[..], b"\x1b[\x1b[0m", b"n c [6n", b"\x1b]0;title\x07"] {
            assert_eq!(shown(&[text]), text);
        }
        let endless = [&b"\x1b["[..], &[b'1'; 100], b"n"].concat();
        assert_eq!(shown(&[&endless]), endless);
    }
}
