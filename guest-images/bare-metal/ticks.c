/* ticks: timer interrupts land in a counting loop, and each mixes the loop's exact position into a
 * hash. One instruction off, anywhere, changes it.
 * Command line: hz= interrupts a second, count= interrupts until the end, poll= rounds of the loop
 * between two port writes (an engine that delivers interrupts only at exits needs those), sleep= not
 * to loop but to halt between interrupts, and print a dot at every so many of them. */

#include "machine.h"

#define DEFAULT_HZ 2000
#define DEFAULT_COUNT 40
#define DEFAULT_POLL 100

extern const char flags_undefined[], flags_defined[];
uint64_t ticks_loop(uint32_t poll, volatile uint32_t *remaining);

static volatile uint32_t remaining;
static uint64_t hash;

void irq_handler(unsigned irq, struct frame *frame)
{
    if (irq != IRQ_TIMER || remaining == 0)
        return;
    uint64_t flags_mask = RFLAGS_STATUS | RFLAGS_CONTROL;
    if (frame->rip >= (uintptr_t)flags_undefined && frame->rip < (uintptr_t)flags_defined)
        flags_mask = RFLAGS_CONTROL;
    hash = hash_position(hash, frame, flags_mask);
    remaining--;
}

void system_call_handler(struct frame *frame)
{
    exception_end(frame);
}

/* Waits for the last interrupt; every `period` of them there is something to do. */
static void sleep_loop(uint32_t period)
{
    for (uint32_t woken = 1;; woken++) {
        interrupts_close();
        if (remaining == 0)
            return;
        interrupts_wait();
        if (woken % period == 0)
            print(".");
    }
}

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    interrupts_start();
    uint32_t count = command_line_number("count", DEFAULT_COUNT);
    uint32_t poll = command_line_number("poll", DEFAULT_POLL);
    uint32_t sleep = command_line_number("sleep", 0);
    remaining = count;
    timer_start(command_line_number("hz", DEFAULT_HZ));
    interrupts_open();
    if (sleep == 0)
        ticks_loop(poll == 0 ? 1 : poll, &remaining);
    else
        sleep_loop(sleep);
    interrupts_close();
    irq_mask(IRQ_TIMER);
    print("ticks: ");
    print_decimal(count);
    print(" interrupts, position hash ");
    print_hexadecimal(hash, 16);
    print("\r\n");
    machine_end();
}
