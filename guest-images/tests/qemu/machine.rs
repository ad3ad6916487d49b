//! QEMU's machine that is like Reprise's: for the tests that run guests on it, and for the benchmark.

/// The program.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// A machine like Reprise's: Nehalem without APIC; a PC's PIC, PIT, RTC, i8042 and one UART.
pub(crate) const MACHINE: &[&str] = &[
    "-machine",
    "pc,usb=off,accel=tcg",
    "-cpu",
    "Nehalem,-apic",
    "-nodefaults",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-no-reboot",
    "-device",
    "isa-debug-exit,iobase=0xf4,iosize=1",
];
