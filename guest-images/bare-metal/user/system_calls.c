/* How the program reaches the kernel, and where the kernel enters it. */

#include "program.h"
#include "system_calls.h"

static void system_call(uint64_t number, uint64_t first, uint64_t second)
{
    __asm__ volatile("int $4" : : "a"(number), "D"(first), "S"(second) : "memory");
}

void system_write(const char *bytes, size_t count)
{
    system_call(SYSTEM_CALL_WRITE, (uint64_t)bytes, count);
}

void system_yield(void)
{
    system_call(SYSTEM_CALL_YIELD, 0, 0);
}

uint64_t system_time(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

_Noreturn void program_entry(uint32_t scale, uint32_t timing)
{
    system_call(SYSTEM_CALL_EXIT, program_run(scale, timing != 0), 0);
    __builtin_unreachable();
}
