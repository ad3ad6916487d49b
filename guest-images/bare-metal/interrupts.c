/* The IDT, the dual 8259A (PIC) and channel 0 of the 8254 (PIT). */

#include "machine.h"

#define PIC_MASTER_COMMAND 0x20
#define PIC_MASTER_DATA 0x21
#define PIC_SLAVE_COMMAND 0xa0
#define PIC_SLAVE_DATA 0xa1
#define PIC_INITIALISE 0x11 /* ICW1: edge triggered, cascade, ICW4 follows */
#define PIC_8086_MODE 0x01 /* ICW4 */
#define PIC_END_OF_INTERRUPT 0x20
#define PIC_SLAVE_LINE 2

#define PIT_CHANNEL_0 0x40
#define PIT_COMMAND 0x43
#define PIT_RATE_GENERATOR 0x34 /* channel 0, low byte then high byte, mode 2, binary */
#define PIT_HZ 1193182

#define KERNEL_CODE 0x10
#define ENTRY_BYTES 16
#define ENTRIES 48
#define VECTOR_DOUBLE_FAULT 8
#define VECTOR_PAGE_FAULT 14
#define GATE_INTERRUPT 0x8e
#define GATE_TRAP_USER 0xef /* DPL 3, and interrupts stay as they are */

struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint8_t stack; /* number in the task state segment's interrupt stack table */
    uint8_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

extern const char interrupt_entries[];

static struct gate gates[ENTRIES] __attribute__((aligned(16)));
static uint8_t masked[2];

static void gate_set(unsigned vector, uint8_t type)
{
    uintptr_t offset = (uintptr_t)interrupt_entries + vector * ENTRY_BYTES;
    gates[vector].offset_low = (uint16_t)offset;
    gates[vector].offset_middle = (uint16_t)(offset >> 16);
    gates[vector].selector = KERNEL_CODE;
    gates[vector].type = type;
}

static void masks_write(void)
{
    port_write(PIC_MASTER_DATA, masked[0]);
    port_write(PIC_SLAVE_DATA, masked[1]);
}

static void pic_start(void)
{
    port_write(PIC_MASTER_COMMAND, PIC_INITIALISE);
    port_write(PIC_SLAVE_COMMAND, PIC_INITIALISE);
    port_write(PIC_MASTER_DATA, VECTOR_IRQ_BASE);
    port_write(PIC_SLAVE_DATA, VECTOR_IRQ_BASE + 8);
    port_write(PIC_MASTER_DATA, 1 << PIC_SLAVE_LINE);
    port_write(PIC_SLAVE_DATA, PIC_SLAVE_LINE);
    port_write(PIC_MASTER_DATA, PIC_8086_MODE);
    port_write(PIC_SLAVE_DATA, PIC_8086_MODE);
    masked[0] = 0xff & ~(1 << PIC_SLAVE_LINE);
    masked[1] = 0xff;
    masks_write();
}

void interrupts_start(void)
{
    for (unsigned vector = 0; vector < ENTRIES; vector++)
        gate_set(vector, GATE_INTERRUPT);
    gate_set(VECTOR_SYSTEM_CALL, GATE_TRAP_USER);
    gates[VECTOR_DOUBLE_FAULT].stack = 1;
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } pointer = { sizeof gates - 1, (uintptr_t)gates };
    __asm__ volatile("lidt %0" : : "m"(pointer));
    pic_start();
}

void irq_unmask(unsigned irq)
{
    masked[irq / 8] &= (uint8_t)~(1u << irq % 8);
    masks_write();
}

void irq_mask(unsigned irq)
{
    masked[irq / 8] |= (uint8_t)(1u << irq % 8);
    masks_write();
}

void timer_start(uint32_t hz)
{
    uint32_t divisor = hz == 0 ? 0xffff : PIT_HZ / hz;
    if (divisor > 0xffff)
        divisor = 0xffff;
    if (divisor < 2)
        divisor = 2; /* mode 2 has no shorter period */
    port_write(PIT_COMMAND, PIT_RATE_GENERATOR);
    port_write(PIT_CHANNEL_0, (uint8_t)divisor);
    port_write(PIT_CHANNEL_0, (uint8_t)(divisor >> 8));
    irq_unmask(IRQ_TIMER);
}

_Noreturn void exception_end(const struct frame *frame)
{
    print("exception ");
    print_decimal((uint32_t)frame->vector);
    print(" error ");
    print_hexadecimal(frame->error_code, 4);
    print(" rip ");
    print_hexadecimal(frame->rip, 16);
    if (frame->vector == VECTOR_PAGE_FAULT) {
        uint64_t address;
        __asm__ volatile("mov %%cr2, %0" : "=r"(address));
        print(" address ");
        print_hexadecimal(address, 16);
    }
    print("\r\n");
    machine_end();
}

/* A guest that handles exceptions has its own. */
__attribute__((weak)) bool exception_handler(struct frame *frame)
{
    (void)frame;
    return false;
}

/* Called by interrupts.S. */
void interrupt_handler(struct frame *frame)
{
    if (frame->vector == VECTOR_SYSTEM_CALL) {
        system_call_handler(frame);
        return;
    }
    if (frame->vector < VECTOR_IRQ_BASE) {
        if (!exception_handler(frame))
            exception_end(frame);
        return;
    }
    unsigned irq = (unsigned)frame->vector - VECTOR_IRQ_BASE;
    irq_handler(irq, frame);
    if (irq >= 8)
        port_write(PIC_SLAVE_COMMAND, PIC_END_OF_INTERRUPT);
    port_write(PIC_MASTER_COMMAND, PIC_END_OF_INTERRUPT);
}
