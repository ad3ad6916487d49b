//! What has left the machine: counted and hashed, compared on replay, never needed for it.
//!
//! The hash is BLAKE3, computed chunk by chunk, so that a checkpoint can store how far it is.

use blake3::CHUNK_LEN;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use reprise_trace::checkpoint::ConsoleState;
use reprise_trace::event::EffectDigest;

/// The running hash of a run's effects.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    console: ConsoleState,
}

impl Effects {
    /// The guest wrote these bytes to its console.
    pub fn console_output(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // Only once more follows: the last chunk of all is hashed otherwise.
            if self.console.tail.len() == CHUNK_LEN {
                self.close_chunk();
            }
            let room = CHUNK_LEN - self.console.tail.len();
            let (taken, rest) = bytes.split_at(room.min(bytes.len()));
            self.console.tail.extend_from_slice(taken);
            self.console.bytes += taken.len() as u64;
            bytes = rest;
        }
    }

    /// Makes a leaf of the tail, and joins it to every subtree that is as large as what it joins.
    fn close_chunk(&mut self) {
        let mut value = self.tail_value();
        let mut chunks = self.console.bytes / CHUNK_LEN as u64;
        while chunks.is_multiple_of(2)
            && let Some(left) = self.console.subtrees.pop()
        {
            value = merge_subtrees_non_root(&left, &value, Mode::Hash);
            chunks /= 2;
        }
        self.console.subtrees.push(value);
        self.console.tail.clear();
    }

    fn tail_value(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(self.console.bytes - self.console.tail.len() as u64);
        hasher.update(&self.console.tail).finalize_non_root()
    }

    /// The digest so far.
    pub fn digest(&self) -> EffectDigest {
        let digest = match self.console.subtrees.split_first() {
            None => blake3::hash(&self.console.tail),
            Some((first, rest)) => {
                let join = |right, left| merge_subtrees_non_root(left, &right, Mode::Hash);
                let right = rest.iter().rev().fold(self.tail_value(), join);
                merge_subtrees_root(first, &right, Mode::Hash)
            }
        };
        EffectDigest { console_bytes: self.console.bytes, console_digest: *digest.as_bytes() }
    }

    /// How far the hash is.
    pub(crate) fn state(&self) -> &ConsoleState {
        &self.console
    }

    /// Goes on from there; `None` if no hash is ever there.
    pub(crate) fn from_state(console: &ConsoleState) -> Option<Self> {
        let tail_bytes = console.tail.len() as u64;
        let chunk = CHUNK_LEN as u64;
        let whole = console.bytes.checked_sub(tail_bytes)?;
        let possible = whole.is_multiple_of(chunk)
            && tail_bytes <= chunk
            && (tail_bytes > 0 || console.bytes == 0)
            && console.bytes < 1 << 62
            && console.subtrees.len() == (whole / chunk).count_ones() as usize;
        possible.then(|| Self { console: console.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_covers_every_byte_however_they_come() {
        let mut whole = Effects::default();
        whole.console_output(b"login: ");
        let mut pieces = Effects::default();
        pieces.console_output(b"log");
        assert_ne!(pieces.digest(), whole.digest());
        pieces.console_output(b"in: ");
        assert_eq!(pieces.digest(), whole.digest());
        assert_eq!(whole.digest().console_bytes, 7);
        assert_eq!(whole.digest().console_digest, *blake3::hash(b"login: ").as_bytes());
    }

    #[test]
    fn it_is_blake3_at_every_length_and_after_every_stop() {
        let text: Vec<u8> = (0..70_000_u32).map(|at| ((at * 7) >> 3) as u8).collect();
        let lengths = [0, 1, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 3073, 4096, 5000, 65_537];
        for piece in [1, 7, 1024, 1500, 70_000] {
            let mut effects = Effects::default();
            let mut done = 0;
            for length in lengths {
                for part in text[done..length].chunks(piece) {
                    effects.console_output(part);
                }
                done = length;
                let expected = *blake3::hash(&text[..length]).as_bytes();
                assert_eq!(effects.digest().console_digest, expected, "{length} by {piece}");
                effects = Effects::from_state(effects.state()).expect("a state that was reached");
                assert_eq!(effects.digest().console_digest, expected, "{length} by {piece}");
            }
        }
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut effects = Effects::default();
        effects.console_output(&[b'x'; 3000]);
        let changes: [fn(&mut ConsoleState); 5] = [
            |state| state.bytes += 1,
            |state| state.bytes = 3,
            |state| state.tail.clear(),
            |state| state.subtrees.truncate(0),
            |state| state.bytes += 1024,
        ];
        for change in changes {
            let mut state = effects.state().clone();
            change(&mut state);
            assert!(Effects::from_state(&state).is_none(), "{state:?}");
        }
    }
}
