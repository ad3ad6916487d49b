/* The stages in their order, and the line that each prints. */

#include "program.h"

typedef bool (*stage_function)(uint32_t scale);

static const stage_function stages[] = { stage_sha256, stage_sort, stage_matrix,
                                         stage_compression };

bool program_run(uint32_t scale, bool timing)
{
    uint64_t before = timing ? system_time() : 0;
    for (size_t stage = 0; stage < sizeof stages / sizeof *stages; stage++) {
        if (!stages[stage](scale))
            return false;
        if (!timing)
            continue;
        uint64_t now = system_time();
        if (now < before)
            return false;
        uint64_t taken = now - before;
        report("  nanoseconds", &taken, 1, 16);
        before = now;
    }
    return true;
}

void report(const char *name, const uint64_t *words, size_t count, unsigned digits)
{
    char line[96];
    size_t at = 0;
    while (name[at] != 0) {
        line[at] = name[at];
        at++;
    }
    line[at++] = ':';
    line[at++] = ' ';
    for (size_t word = 0; word < count; word++) {
        for (unsigned digit = digits; digit > 0; digit--)
            line[at++] = "0123456789abcdef"[words[word] >> (4 * (digit - 1)) & 15];
    }
    line[at++] = '\r';
    line[at++] = '\n';
    system_write(line, at);
}
