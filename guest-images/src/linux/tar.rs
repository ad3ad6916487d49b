//! Takes one file out of a tar stream (POSIX.1-1988 ustar headers, GNU long names), which is what a
//! Debian package unpacks to. Nothing but that file is written anywhere.

use std::io::{self, Read};

const BLOCK_BYTES: usize = 512;
/// The largest file that is taken: a kernel has some 10 MB.
const CONTENT_MAX_BYTES: u64 = 256 << 20;

/// The content of the first regular file whose name, without a leading `./`, `wanted` accepts.
/// `None` if the archive holds none.
pub(super) fn find(
    stream: &mut impl Read,
    wanted: &dyn Fn(&str) -> bool,
) -> io::Result<Option<Vec<u8>>> {
    let mut long_name = None;
    let mut header = [0; BLOCK_BYTES];
    loop {
        stream.read_exact(&mut header)?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let bytes = octal(&header[124..136])?;
        let kind = header[156];
        let name = long_name.take().unwrap_or_else(|| text(&header[..100]));
        let is_wanted = matches!(kind, b'0' | 0) && wanted(name.trim_start_matches("./"));
        if is_wanted || kind == b'L' {
            let content = read_content(stream, bytes)?;
            if is_wanted {
                return Ok(Some(content));
            }
            long_name = Some(text(&content));
        } else {
            skip(stream, padded(bytes))?;
        }
    }
}

fn read_content(stream: &mut impl Read, bytes: u64) -> io::Result<Vec<u8>> {
    if bytes > CONTENT_MAX_BYTES {
        return Err(malformed("a file of it is too large"));
    }
    let mut content = Vec::new();
    stream.by_ref().take(bytes).read_to_end(&mut content)?;
    if content.len() as u64 != bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    skip(stream, padded(bytes) - bytes)?;
    Ok(content)
}

fn skip(stream: &mut impl Read, bytes: u64) -> io::Result<()> {
    let skipped = io::copy(&mut stream.by_ref().take(bytes), &mut io::sink())?;
    if skipped == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES as u64)
}

/// Up to the first zero byte.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn octal(field: &[u8]) -> io::Result<u64> {
    let digits = text(field);
    let number = u64::from_str_radix(digits.trim(), 8);
    // Twelve octal digits at most, so that rounding up to a block cannot overflow.
    number.map_err(|_| malformed("a size in it is not octal"))
}

fn malformed(reason: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the package's archive is damaged: {reason}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        bytes[156] = kind;
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes
    }

    fn sample() -> Vec<u8> {
        let long = "long/".repeat(30);
        [
            file("./boot/", b'5', b""),
            file("./boot/config-6", b'0', &[1; 700]),
            file("././@LongLink", b'L', format!("./{long}file\0").as_bytes()),
            file("./long/long", b'0', b"behind a long name"),
            file("./boot/vmlinuz-6", b'0', &[2; 513]),
            vec![0; 2 * BLOCK_BYTES],
        ]
        .concat()
    }

    #[test]
    fn it_finds_the_file_and_nothing_else() {
        let find = |start: &'static str| {
            find(&mut sample().as_slice(), &|name| name.starts_with(start)).expect("it is sound")
        };
        assert_eq!(find("boot/vmlinuz-"), Some(vec![2; 513]));
        assert_eq!(find("long/long/long"), Some(b"behind a long name".to_vec()));
        assert_eq!(find("boot/initrd"), None);
    }

    #[test]
    fn a_cut_stream_is_an_error_unless_the_file_is_before_the_cut() {
        let whole = sample();
        let end = whole.len() - 3 * BLOCK_BYTES;
        for length in 0..whole.len() - 2 * BLOCK_BYTES {
            let found = find(&mut &whole[..length], &|name| name == "boot/vmlinuz-6");
            assert!(found.is_err(), "cut at {length}, the file ends at {end}");
        }
    }

    #[test]
    fn a_wild_size_is_an_error() {
        for size in [b"77777777777\0", b"99999999999\0", b"           \0"] {
            let mut bytes = file("./boot/vmlinuz-6", b'0', b"");
            bytes[124..136].copy_from_slice(size);
            assert!(find(&mut bytes.as_slice(), &|_| true).is_err());
        }
    }
}
