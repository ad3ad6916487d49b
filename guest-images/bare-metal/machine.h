/* What the bare-metal guests know of their machine: PIC, PIT, 16550, i8042, debug exit. */
#ifndef MACHINE_H
#define MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- ports ------------------------------------------------------------------------------ */

#define PORT_DELAY 0x80 /* the diagnostic port: a write does nothing but leave the processor */
#define PORT_DEBUG_EXIT 0xf4

static inline void port_write(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t port_read(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* ---- console.c: the 16550 at 0x3f8, and the way out --------------------------------------- */

void console_start(void);
/* Opens the receive interrupt (IRQ 4). */
void console_receive_interrupt_on(void);
/* The next received byte, or -1. */
int console_take(void);
void console_write(const char *bytes, size_t count);
void print(const char *text);
void print_decimal(uint32_t value);
void print_hexadecimal(uint64_t value, unsigned digits);
/* Resets the machine through the i8042; where that does nothing, halts for ever. */
_Noreturn void machine_end(void);

/* ---- command_line.c: words of the form key=value ------------------------------------------ */

/* Null stands for an empty command line. */
void command_line_set(const char *text);
/* The decimal number after `key=`, at most 4294967295, or `otherwise`. */
uint32_t command_line_number(const char *key, uint32_t otherwise);
/* Whether `key=word` is there. */
bool command_line_is(const char *key, const char *word);

/* ---- interrupts.c: IDT, PIC, PIT (64-bit guests only) --------------------------------------- */

/* What interrupts.S pushes; `rip` and below come from the processor. */
struct frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
    uint64_t rdi, rsi, rbp, rbx, rdx, rcx, rax;
    uint64_t vector, error_code;
    uint64_t rip, cs, rflags, rsp, ss;
};

#define RFLAGS_CF 0x1
#define RFLAGS_PF 0x4
#define RFLAGS_ZF 0x40
#define RFLAGS_SF 0x80
#define RFLAGS_OF 0x800
/* The status flags but AF, which the logical instructions leave undefined. */
#define RFLAGS_STATUS (RFLAGS_CF | RFLAGS_PF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF)
/* TF, IF, DF. RF is left out: hardware sets it where an interrupt cuts a REP short, and an
 * interpreter may not. */
#define RFLAGS_CONTROL 0x700

#define VECTOR_GENERAL_PROTECTION 13
#define VECTOR_IRQ_BASE 0x20
/* INT 4, the overflow exception's vector: a hypervisor without hardware support runs CPL3 on the
 * host's own IDT, and passes on only those software interrupts whose gates the host opens to CPL3.
 * Those are 3 and 4, and 3 is the debuggers'. */
#define VECTOR_SYSTEM_CALL 4
#define IRQ_TIMER 0
#define IRQ_CONSOLE 4

/* Loads the IDT, and the PIC with every line masked. */
void interrupts_start(void);
void irq_unmask(unsigned irq);
void irq_mask(unsigned irq);
/* PIT channel 0, periodic, `hz` from 19 to 1193182. */
void timer_start(uint32_t hz);

/* Each guest has these. For an IRQ the end of interrupt is sent after `irq_handler` returns. */
void irq_handler(unsigned irq, struct frame *frame);
void system_call_handler(struct frame *frame);
/* May be left out: then every exception ends the machine. False if the exception is to do so. */
bool exception_handler(struct frame *frame);

/* Prints the exception and ends the machine. */
_Noreturn void exception_end(const struct frame *frame);

static inline void interrupts_open(void)
{
    __asm__ volatile("sti" : : : "memory");
}

static inline void interrupts_close(void)
{
    __asm__ volatile("cli" : : : "memory");
}

/* Waits for one interrupt. The STI holds interrupts off for one instruction, so that none is
 * handled between the caller's last look and the HLT. */
static inline void interrupts_wait(void)
{
    __asm__ volatile("sti; hlt" : : : "memory");
}

/* ---- position_hash.c: where exactly an interrupt landed ------------------------------------- */

/* Mixes one value into a running hash. */
uint64_t hash_mix(uint64_t hash, uint64_t value);
/* Mixes every general register, RIP, and the flags that `flags_mask` keeps. */
uint64_t hash_position(uint64_t hash, const struct frame *frame, uint64_t flags_mask);

#endif
