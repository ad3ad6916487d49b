/* The stages in their order, and the line that each prints. */

#include "program.h"

bool program_run(uint32_t scale)
{
    return stage_sha256(scale) && stage_sort(scale) && stage_matrix(scale)
        && stage_compression(scale);
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
