//! The boot stub of a bzImage: where it leaves for the kernel that it has unpacked.
//!
//! The stub copies itself to the end of the memory that it unpacks to, so where that jump executes is not
//! known beforehand, nor, as the kernel may choose its place at random, where it leads. But what the jump is
//! can be told in any kernel: behind the call of the function that unpacks the kernel, and gives its entry
//! in RAX, the stub moves the boot parameters' address to RSI and jumps to RAX
//! (arch/x86/boot/compressed/head_64.S).

/// `jmp *%rax`, and what may stand between it and the call before it: `mov %r15, %rsi` of later kernels,
/// and `pop %rsi` of earlier ones.
const JUMP: [u8; 2] = [0xff, 0xe0];
const BETWEEN: [&[u8]; 2] = [&[0x4c, 0x89, 0xfe], &[0x5e]];
/// `call`, with its distance.
const CALL: u8 = 0xe8;
const CALL_BYTES: usize = 5;
/// By so many bytes before and behind it the jump is known in memory.
const BEFORE: usize = 16;
const BEHIND: usize = 8;

/// How a kernel comes to lie in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Unpacking {
    /// It is loaded where it is linked to.
    #[default]
    None,
    /// A boot stub unpacks it, and leaves with this jump.
    By(LastJump),
    /// A boot stub unpacks it whose last jump is not known.
    Unknown,
}

/// The jump to the unpacked kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastJump {
    /// The stub's code around it.
    pub code: Vec<u8>,
    /// The offset of the jump in that code.
    pub offset: usize,
}

impl LastJump {
    /// Bytes of the jump itself, which leads to where RAX says.
    pub const BYTES: usize = JUMP.len();
}

/// The last jump of a stub that consists of these pieces.
pub(crate) fn last_jump(stub: [&[u8]; 2]) -> Unpacking {
    let found: Vec<LastJump> = stub.into_iter().flat_map(jumps_of).collect();
    match <[LastJump; 1]>::try_from(found) {
        Ok([jump]) => Unpacking::By(jump),
        Err(_) => Unpacking::Unknown,
    }
}

fn jumps_of(piece: &[u8]) -> impl Iterator<Item = LastJump> {
    let is_one = |at: &usize| {
        let before = &piece[..*at];
        piece[*at..].starts_with(&JUMP)
            && BETWEEN.iter().any(|between| {
                let call = before.len().checked_sub(between.len() + CALL_BYTES);
                before.ends_with(between) && call.is_some_and(|call| before[call] == CALL)
            })
    };
    (BEFORE..(piece.len() + 1).saturating_sub(BEHIND + JUMP.len())).filter(is_one).map(|at| {
        LastJump { code: piece[at - BEFORE..at + JUMP.len() + BEHIND].to_vec(), offset: BEFORE }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stub(end: &[u8]) -> Vec<u8> {
        // A jump that is not the last one, then the call.
        let start = [&[0x90; 20][..], &[0x01, 0xf8, 0xff, 0xe0], &[0x90; 8], &[CALL, 1, 2, 3, 4]];
        [&start.concat()[..], end, &JUMP, &[0xf4; 8]].concat()
    }

    #[test]
    fn the_last_jump_is_known_by_what_stands_before_it() {
        for between in BETWEEN {
            let stub = stub(between);
            let Unpacking::By(jump) = last_jump([&[], &stub]) else { panic!("{between:x?}") };
            assert_eq!(jump.code[jump.offset..][..LastJump::BYTES], JUMP);
            let before = &jump.code[..jump.offset];
            assert!(before.ends_with(between) && before.contains(&CALL), "{before:x?}");
        }
    }

    #[test]
    fn what_is_not_there_or_there_twice_is_not_known() {
        assert_eq!(last_jump([&[], &stub(&[0x90])]), Unpacking::Unknown);
        let stub = stub(BETWEEN[0]);
        assert_eq!(last_jump([&stub, &stub]), Unpacking::Unknown);
        for length in 0..stub.len() {
            let _ = last_jump([&stub[..length], &[]]);
        }
    }
}
