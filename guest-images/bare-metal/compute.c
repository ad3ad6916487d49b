/* compute: a small kernel at CPL0, and real work at CPL3 in user pages (user/). Timer interrupts
 * come and are counted, but not told: their number hangs on the machine's speed.
 * User code's RDTSC is refused (CR4.TSD), and its #GP answered with the kernel's own: under a
 * hypervisor that cannot trap RDTSC by itself, one at a known place in the kernel can be.
 * Command line: scale= units of about 20 million instructions, 0 for some 50 thousand; hz= timer
 * interrupts a second; timing=1 prints how long each stage
 * took, in nanoseconds by the time-stamp counter; tsd=0 leaves user code's RDTSC to the processor;
 * yields=0 leaves out the exits on the way, so that user code runs as it would in a process. */

#include "machine.h"
#include "user/system_calls.h"

#define DEFAULT_SCALE 150
#define DEFAULT_HZ 100

#define USER_CODE 0x33
#define USER_DATA 0x2b
#define RFLAGS_AT_ENTRY 0x202 /* IF */

#define LARGE_PAGE_BYTES 0x200000
#define PAGE_WRITABLE 0x2
#define PAGE_USER 0x4
#define CR4_TSD 0x4
#define RDTSC_BYTES 2

#define USER_TEXT 0x400000
#define USER_DATA_START 0x600000
#define USER_END 0xe00000 /* the stack grows down from here */

extern uint64_t page_directory_first_gib[];
extern const char program_entry[];

static volatile uint32_t timer_interrupts;

void irq_handler(unsigned irq, struct frame *frame)
{
    (void)frame;
    if (irq == IRQ_TIMER)
        timer_interrupts++;
}

extern char system_yield[];

/* The program's own function returns at once. */
static void leave_yields_out(void)
{
    *(volatile uint8_t *)system_yield = 0xc3; /* RET */
}

static bool is_user_range(uint64_t start, uint64_t bytes)
{
    return start >= USER_TEXT && start <= USER_END && bytes <= USER_END - start;
}

/* RDTSC in user code. */
bool exception_handler(struct frame *frame)
{
    if (frame->vector != VECTOR_GENERAL_PROTECTION || frame->error_code != 0
        || frame->cs != USER_CODE || !is_user_range(frame->rip, RDTSC_BYTES))
        return false;
    const uint8_t *code = (const uint8_t *)frame->rip;
    if (code[0] != 0x0f || code[1] != 0x31)
        return false;
    __asm__ volatile("rdtsc" : "=a"(frame->rax), "=d"(frame->rdx));
    frame->rip += RDTSC_BYTES;
    return true;
}

static _Noreturn void program_end(bool right)
{
    interrupts_close();
    irq_mask(IRQ_TIMER);
    print(right ? "compute: done\r\n" : "compute: a result is wrong\r\n");
    machine_end();
}

/* Interrupts are open: the gate is a trap gate. */
void system_call_handler(struct frame *frame)
{
    switch (frame->rax) {
    case SYSTEM_CALL_EXIT:
        program_end(frame->rdi != 0);
    case SYSTEM_CALL_WRITE:
        if (is_user_range(frame->rdi, frame->rsi)) {
            console_write((const char *)frame->rdi, frame->rsi);
            return;
        }
        break;
    case SYSTEM_CALL_YIELD:
        port_write(PORT_DELAY, 0);
        return;
    }
    exception_end(frame);
}

/* Code read-only, data and stack writable; the rest stays the kernel's. */
static void open_user_pages(void)
{
    for (uint64_t page = USER_TEXT; page < USER_END; page += LARGE_PAGE_BYTES) {
        uint64_t *entry = &page_directory_first_gib[page / LARGE_PAGE_BYTES];
        *entry |= PAGE_USER;
        if (page < USER_DATA_START)
            *entry &= ~(uint64_t)PAGE_WRITABLE;
    }
    uint64_t tables;
    __asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(tables) : : "memory");
}

/* IRETQ to user code does so with the kernel's, except that hypervisors which interpret it forget to. */
static void null_data_segments(void)
{
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" : : "r"(0));
}

static void refuse_user_time_stamps(void)
{
    uint64_t control;
    __asm__ volatile("mov %%cr4, %0; or %1, %0; mov %0, %%cr4" : "=&r"(control) : "i"(CR4_TSD));
}

static _Noreturn void enter_user(uint32_t scale, uint32_t timing)
{
    __asm__ volatile("push %0; push %1; push %2; push %3; push %4; iretq"
                     :
                     : "i"(USER_DATA), "r"((uint64_t)USER_END - 8), "i"(RFLAGS_AT_ENTRY),
                       "i"(USER_CODE), "r"(program_entry), "D"(scale), "S"(timing)
                     : "memory");
    __builtin_unreachable();
}

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    interrupts_start();
    if (command_line_number("yields", 1) == 0)
        leave_yields_out();
    open_user_pages();
    if (command_line_number("tsd", 1))
        refuse_user_time_stamps();
    uint32_t scale = command_line_number("scale", DEFAULT_SCALE);
    timer_start(command_line_number("hz", DEFAULT_HZ));
    null_data_segments();
    enter_user(scale, command_line_number("timing", 0));
}
