//! What has left the machine: counted and hashed, compared on replay, never needed for it.

use reprise_trace::event::EffectDigest;

/// The running hash of a run's effects.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    console_bytes: u64,
    console: blake3::Hasher,
}

impl Effects {
    /// The guest wrote these bytes to its console.
    pub(crate) fn console_output(&mut self, bytes: &[u8]) {
        self.console_bytes += bytes.len() as u64;
        self.console.update(bytes);
    }

    /// The digest so far.
    pub fn digest(&self) -> EffectDigest {
        EffectDigest {
            console_bytes: self.console_bytes,
            console_digest: *self.console.finalize().as_bytes(),
        }
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
}
