/* A running 64-bit hash of where interrupts landed. */

#include "machine.h"

#define GOLDEN_RATIO 0x9e3779b97f4a7c15 /* 2^64 over the golden ratio, as in Knuth, volume 3, 6.4 */

uint64_t hash_mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * GOLDEN_RATIO;
    return hash ^ (hash >> 29);
}

uint64_t hash_position(uint64_t hash, const struct frame *frame, uint64_t flags_mask)
{
    const uint64_t *registers = &frame->r15;
    for (unsigned at = 0; at < 15; at++)
        hash = hash_mix(hash, registers[at]);
    hash = hash_mix(hash, frame->rip);
    return hash_mix(hash, frame->rflags & flags_mask);
}
