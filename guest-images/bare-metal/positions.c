/* positions: timer interrupts land where it is hard to land twice, and each mixes its exact position
 * into a hash. Command line: do= one of the places below, hz= interrupts a second, count= interrupts
 * until the end. */

#include "machine.h"

#define DEFAULT_HZ 20000
#define DEFAULT_COUNT 40

#define KERNEL_CODE 0x10
#define KERNEL_DATA 0x18
#define LARGE_PAGE_BYTES 0x200000
#define PAGE_BYTES 0x1000
#define PAGE_PRESENT 0x1
#define PAGE_USER 0x4
#define TABLE_RIGHTS 0x7 /* user, writable, present */

/* 16 MiB: a large page of RAM that nothing else uses, remapped in small ones. */
#define SMALL_PAGES 0x1000000

extern uint64_t page_directory_first_gib[];
extern const char scenario_end[], page_fault_entry[], undefined_entry[], system_call_entry[];
uint64_t scenario_stack;

void scenario_rep(void);
void scenario_straight(void);
void scenario_itself(void);
void scenario_memory(void);
void scenario_shadow(void);
void scenario_hlt(void);
void scenario_fault(void);
void scenario_window(void);
void scenario_user(void);
void scenario_code(void);
void scenario_ports(void);
void scenario_accessed(void);

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    { "rep", scenario_rep },         { "straight", scenario_straight },
    { "itself", scenario_itself },   { "memory", scenario_memory },
    { "shadow", scenario_shadow },   { "hlt", scenario_hlt },
    { "fault", scenario_fault },     { "window", scenario_window },
    { "user", scenario_user },       { "code", scenario_code },
    { "ports", scenario_ports },     { "accessed", scenario_accessed },
};

static uint64_t small_pages[512] __attribute__((aligned(PAGE_BYTES)));
static uint32_t remaining;
static uint64_t hash;

void irq_handler(unsigned irq, struct frame *frame)
{
    if (irq == IRQ_CONSOLE) {
        /* All of it: what is left would raise no edge again. */
        for (int byte = console_take(); byte >= 0; byte = console_take())
            hash = hash_mix(hash, (uint64_t)byte);
    }
    hash = hash_position(hash, frame, RFLAGS_STATUS | RFLAGS_CONTROL);
    if (irq != IRQ_TIMER || remaining == 0)
        return;
    remaining--;
    if (remaining == 0) {
        frame->rip = (uintptr_t)scenario_end;
        frame->cs = KERNEL_CODE;
        frame->rflags = 2;
        frame->rsp = scenario_stack;
        frame->ss = KERNEL_DATA;
    }
}

/* INT 4 from user mode. */
void system_call_handler(struct frame *frame)
{
    hash = hash_mix(hash, frame->rip);
}

/* Called by page_fault_entry: makes the page present that was not. */
void page_fault_handler(void)
{
    uint64_t address;
    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    small_pages[address / PAGE_BYTES % 512] |= PAGE_PRESENT;
}

/* Called by scenarios: takes a page away again. */
void page_remove(uint64_t number)
{
    uint64_t address = SMALL_PAGES + number * PAGE_BYTES;
    small_pages[number] &= ~(uint64_t)PAGE_PRESENT;
    __asm__ volatile("invlpg (%0)" : : "r"(address) : "memory");
}

static void make_small_pages(void)
{
    for (unsigned at = 0; at < 512; at++)
        small_pages[at] = (SMALL_PAGES + at * PAGE_BYTES) | TABLE_RIGHTS;
    page_directory_first_gib[SMALL_PAGES / LARGE_PAGE_BYTES] = (uintptr_t)small_pages | TABLE_RIGHTS;
    /* The guest's own image, for the scenario at CPL3. */
    page_directory_first_gib[0] |= PAGE_USER;
    uint64_t tables;
    __asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(tables) : : "memory");
}

static void set_entry(unsigned vector, const char *entry)
{
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } pointer;
    __asm__ volatile("sidt %0" : "=m"(pointer));
    uint16_t *gate = (uint16_t *)(pointer.base + vector * 16);
    gate[0] = (uint16_t)(uintptr_t)entry;
    gate[3] = (uint16_t)((uintptr_t)entry >> 16);
}

static void write_msr(uint32_t index, uint64_t value)
{
    __asm__ volatile("wrmsr" : : "c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

static void system_calls_start(void)
{
    write_msr(0xc0000080, 0x501); /* EFER: LMA, LME, SCE */
    write_msr(0xc0000081, (uint64_t)0x20 << 48 | (uint64_t)KERNEL_CODE << 32); /* STAR */
    write_msr(0xc0000082, (uintptr_t)system_call_entry); /* LSTAR */
    write_msr(0xc0000084, 0x700); /* SFMASK: DF, IF, TF */
}

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    interrupts_start();
    set_entry(14, page_fault_entry);
    set_entry(6, undefined_entry);
    make_small_pages();
    system_calls_start();
    remaining = command_line_number("count", DEFAULT_COUNT);
    for (unsigned at = 0; at < sizeof scenarios / sizeof scenarios[0]; at++) {
        if (!command_line_is("do", scenarios[at].name))
            continue;
        irq_unmask(IRQ_CONSOLE);
        console_receive_interrupt_on();
        timer_start(command_line_number("hz", DEFAULT_HZ));
        scenarios[at].run();
        irq_mask(IRQ_TIMER);
        print("positions: ");
        print(scenarios[at].name);
        print(", hash ");
        print_hexadecimal(hash, 16);
        print("\r\n");
        machine_end();
    }
    print("positions: do= one of");
    for (unsigned at = 0; at < sizeof scenarios / sizeof scenarios[0]; at++) {
        print(" ");
        print(scenarios[at].name);
    }
    print("\r\n");
    machine_end();
}
