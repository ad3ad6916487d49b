//! Names for addresses: from the symbol table of an ELF file (a vmlinux, a guest, a program), or from a
//! list as `System.map` and `/proc/kallsyms` are.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::{Object, ObjectSection, ObjectSymbol, ReadCache, SectionKind, SymbolKind};

/// How an ELF file starts.
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// The longest line of a list of symbols: longer ones are no such lines. The kernel's own limit on a
/// name is 512 (`KSYM_NAME_LEN`).
const MAX_LINE_BYTES: u64 = 4096;

/// Why a file gives no symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}; check the path and its permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// It is an ELF file that is not whole.
    #[error("{path} is a malformed ELF file ({error}): take another copy")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: object::Error,
    },
    /// It names nothing.
    #[error(
        "{path} has no symbols: give an ELF file that is not stripped, a System.map with addresses, \
         or a copy of the guest's /proc/kallsyms, read as root"
    )]
    None {
        /// The file.
        path: PathBuf,
    },
}

/// A named piece of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Symbol {
    start: u64,
    /// The last address that belongs to it.
    last: u64,
    /// Of several at one place the one with the lowest rank gives the name.
    rank: u8,
    name: Arc<str>,
}

/// Symbols of any number of files, by address.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    list: Vec<Symbol>,
}

impl Symbols {
    /// No symbols.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Adds the symbols of a file, `offset` bytes above where the file has them: where the kernel was
    /// moved to, or where a position-independent program was loaded. Gives how many they are.
    ///
    /// # Errors
    /// If the file cannot be read, is malformed, or names nothing.
    pub fn add_file(&mut self, path: &Path, offset: u64) -> Result<usize, SymbolError> {
        let unreadable = |error| SymbolError::Read { path: path.to_owned(), error };
        let mut file = File::open(path).map_err(unreadable)?;
        let mut magic = Vec::new();
        (&mut file).take(4).read_to_end(&mut magic).map_err(unreadable)?;
        file.rewind().map_err(unreadable)?;
        let found = if magic == ELF_MAGIC {
            from_elf(file)
                .map_err(|error| SymbolError::Malformed { path: path.to_owned(), error })?
        } else {
            from_list(BufReader::new(file)).map_err(unreadable)?
        };
        if found.is_empty() {
            return Err(SymbolError::None { path: path.to_owned() });
        }
        let count = found.len();
        self.list.extend(found.into_iter().map(|symbol| Symbol {
            start: symbol.start.wrapping_add(offset),
            last: symbol.last.wrapping_add(offset),
            ..symbol
        }));
        self.list.sort_by(|a, b| {
            (a.start, a.rank).cmp(&(b.start, b.rank)).then_with(|| a.name.cmp(&b.name))
        });
        self.list.dedup_by_key(|symbol| symbol.start);
        Ok(count)
    }

    /// The name of what lies at an address, and how far behind its beginning that is.
    pub fn find(&self, address: u64) -> Option<(&Arc<str>, u64)> {
        let behind = self.list.partition_point(|symbol| symbol.start <= address);
        let symbol = &self.list[behind.checked_sub(1)?];
        (address <= symbol.last).then(|| (&symbol.name, address - symbol.start))
    }

    /// `name+0x1f`, or `name` at its beginning.
    pub fn describe(&self, address: u64) -> Option<String> {
        self.find(address).map(|(name, offset)| match offset {
            0 => name.to_string(),
            offset => format!("{name}+{offset:#x}"),
        })
    }
}

/// A symbol, and whether its size is known; the end of others is where they reach at most.
type Found = (bool, Symbol);

/// What an ELF file's table names in its sections; the dynamic table where there is no other.
fn from_elf(file: File) -> object::Result<Vec<Symbol>> {
    let cache = ReadCache::new(file);
    let elf = object::File::parse(&cache)?;
    let mut found = Vec::new();
    for symbol in elf.symbols() {
        found.extend(in_a_section(&elf, &symbol)?);
    }
    if found.is_empty() {
        for symbol in elf.dynamic_symbols() {
            found.extend(in_a_section(&elf, &symbol)?);
        }
    }
    Ok(bounded(found))
}

/// A symbol that names a place in memory.
fn in_a_section<'a>(
    elf: &impl Object<'a>,
    symbol: &impl ObjectSymbol<'a>,
) -> object::Result<Option<Found>> {
    let rank = match symbol.kind() {
        SymbolKind::Text => 0,
        SymbolKind::Data => 1,
        // What assembly names without saying what it is.
        SymbolKind::Unknown | SymbolKind::Label => 2,
        _ => return Ok(None),
    };
    let Some(section) = symbol.section_index() else { return Ok(None) };
    let section = elf.section_by_index(section)?;
    let (start, size) = (symbol.address(), symbol.size());
    let section_end = section.address().saturating_add(section.size());
    let is_loaded = section.address() > 0
        && !matches!(section.kind(), SectionKind::Metadata | SectionKind::Debug);
    // A name may be any bytes: one that is no text is left out.
    let Ok(name) = symbol.name() else { return Ok(None) };
    if name.is_empty() || !is_loaded || start >= section_end {
        return Ok(None);
    }
    let end = if size > 0 { start.saturating_add(size) } else { section_end };
    // Functions before names that only mark a place; global before local ones.
    let rank = 2 * rank + u8::from(symbol.is_local());
    Ok(Some((size > 0, Symbol { start, last: end - 1, rank, name: name.into() })))
}

/// What a list names: an address in hexadecimal, a letter for its kind, a name.
fn from_list(mut list: impl BufRead) -> io::Result<Vec<Symbol>> {
    let mut symbols = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if list.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let Ok(text) = std::str::from_utf8(&line) else { continue };
        let mut fields = text.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (Ok(start), [kind]) = (u64::from_str_radix(address, 16), kind.as_bytes()) else {
            continue;
        };
        let rank = match kind.to_ascii_lowercase() {
            b't' => 0,
            b'w' | b'v' => 1,
            b'b' | b'd' | b'r' | b'n' => 2,
            // An absolute value, or undefined: no place in memory.
            _ => continue,
        };
        // Without the right to see addresses all of them read as zero; so does per-CPU data's. Debian's
        // System.map has one line, at the last address there is, that says that it has no symbols.
        if start > 0 && start < u64::MAX {
            symbols.push((false, Symbol { start, last: u64::MAX, rank, name: name.into() }));
        }
    }
    Ok(bounded(symbols))
}

/// Ends those whose size is not known (false) where the next one begins.
fn bounded(mut symbols: Vec<Found>) -> Vec<Symbol> {
    symbols.sort_by_key(|(_, symbol)| symbol.start);
    let mut next = u64::MAX;
    let mut bounded = Vec::with_capacity(symbols.len());
    let mut before = u64::MAX;
    for (sized, mut symbol) in symbols.into_iter().rev() {
        if symbol.start != before {
            next = before;
            before = symbol.start;
        }
        if !sized {
            // The last one reaches a page at most.
            let limit = if next == u64::MAX { symbol.start | 0xfff } else { next - 1 };
            symbol.last = symbol.last.min(limit);
        }
        bounded.push(symbol);
    }
    bounded
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
ffffffff81000000 T _stext
ffffffff81000000 T startup_64
ffffffff81000100 t helper\t[module]
ffffffff81000180 W weak
ffffffff81000200 A absolute
ffffffff82000000 D data
000000000001f000 D
0000000000000000 A zero
nonsense
";

    fn symbols(list: &str) -> Symbols {
        let list = from_list(list.as_bytes()).expect("text can be read");
        let mut symbols = Symbols { list };
        symbols.list.sort_by(|a, b| (a.start, a.rank, &a.name).cmp(&(b.start, b.rank, &b.name)));
        symbols.list.dedup_by_key(|symbol| symbol.start);
        symbols
    }

    #[test]
    fn a_list_names_addresses_up_to_the_next_symbol() {
        let symbols = symbols(MAP);
        for (address, name) in [
            (0xffff_ffff_8100_0000, Some("_stext")),
            (0xffff_ffff_8100_00ff, Some("_stext+0xff")),
            (0xffff_ffff_8100_0100, Some("helper")),
            (0xffff_ffff_8100_0200, Some("weak+0x80")),
            (0xffff_ffff_8200_0fff, Some("data+0xfff")),
            (0xffff_ffff_8200_1000, None),
            (0xffff_ffff_80ff_ffff, None),
            (0x1f000, None),
            (0, None),
            (u64::MAX, None),
        ] {
            assert_eq!(symbols.describe(address).as_deref(), name, "{address:#x}");
        }
    }

    #[test]
    fn what_is_no_list_names_nothing() {
        let debian =
            "ffffffffffffffff B The real System.map is in the linux-image-VERSION-dbg package";
        for text in [debian, "", "hello world\n", "zz T name\n", "0 T hidden\n", "\0\x01\x02\n12 T"]
        {
            assert!(from_list(text.as_bytes()).expect("read").is_empty(), "{text:?}");
        }
    }
}
