//! Disassembly with names, the same wherever instructions are shown.

use std::sync::Arc;

use iced_x86::{Formatter as _, GasFormatter, Instruction, SymbolResolver, SymbolResult};

use crate::symbols::Symbols;

/// Bytes of an instruction that a line has room for; most have fewer.
pub const BYTES_COLUMNS: usize = 20;

/// Names operands.
struct Names(Arc<Symbols>);

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        _: &Instruction,
        _: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let name = self.0.describe(address)?;
        Some(SymbolResult::with_string(address, format!("{address:#x} <{name}>")))
    }
}

/// Writes instructions as text, with the symbols that their operands name.
pub fn formatter(symbols: &Arc<Symbols>) -> GasFormatter {
    let names: Option<Box<dyn SymbolResolver>> =
        if symbols.is_empty() { None } else { Some(Box::new(Names(Arc::clone(symbols)))) };
    let mut formatter = GasFormatter::with_options(names, None);
    // As everything else that is shown has them.
    formatter.options_mut().set_uppercase_hex(false);
    formatter
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    /// What CALL to 0x1005 is shown as.
    fn call(symbols: Symbols) -> String {
        let code = [0xe8, 0x00, 0x00, 0x00, 0x00];
        let decoded =
            Decoder::with_ip(64, &code, 0xffff_0000_0000_1000, DecoderOptions::NONE).decode();
        let mut text = String::new();
        formatter(&Arc::new(symbols)).format(&decoded, &mut text);
        text
    }

    #[test]
    fn an_operand_has_its_symbol_beside_the_address() {
        let file = std::env::temp_dir().join(format!("reprise-symbols-{}", std::process::id()));
        std::fs::write(&file, "ffff000000001000 T here\n").expect("a file");
        let mut symbols = Symbols::new();
        symbols.add_file(&file, 0).expect("a list of symbols");
        std::fs::remove_file(&file).expect("it is there");
        assert_eq!(call(symbols), "call 0xffff000000001005 <here+0x5>");
        assert_eq!(call(Symbols::new()), "call 0xffff000000001005");
    }
}
