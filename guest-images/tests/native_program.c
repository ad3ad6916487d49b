/* The program of the compute guest as a process of the host: its output is what the guest must print. */

#include <stdlib.h>
#include <unistd.h>

#include "program.h"

void system_write(const char *bytes, size_t count)
{
    while (count > 0) {
        ssize_t written = write(1, bytes, count);
        if (written <= 0)
            exit(2);
        bytes += written;
        count -= (size_t)written;
    }
}

void system_yield(void)
{
}

uint64_t system_time(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

int main(int count, char **words)
{
    return program_run(count > 1 ? (uint32_t)atoi(words[1]) : 1, false) ? 0 : 1;
}
