/* The program that compute runs at CPL3. Plain C without a library, so that the same sources built for
 * the host print the same lines: that is how its results are checked. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- what runs it gives it: system_calls.c in the guest ------------------------------------ */

void system_write(const char *bytes, size_t count);
/* Lets interrupts in where an engine can deliver them only at exits. */
void system_yield(void);
/* The time-stamp counter: nanoseconds in the guest. */
uint64_t system_time(void);

/* ---- the program ----------------------------------------------------------------------------- */

/* About 20 million instructions for each unit of `scale`, some 50 thousand where it is zero. False if a result is wrong. If `timing`,
 * prints how long each stage took; then also false if the time-stamp counter does not go on. */
bool program_run(uint32_t scale, bool timing);

/* Each stage does about 5 million instructions for each unit of `scale`, yields every two
 * million or so, and prints one line; where `scale` is zero, one turn of a small size. False if it
 * finds its own result wrong. */
bool stage_sha256(uint32_t scale);
bool stage_sort(uint32_t scale);
bool stage_matrix(uint32_t scale);
bool stage_compression(uint32_t scale);

/* ---- what the stages share ------------------------------------------------------------------- */

/* xorshift64* (S. Vigna, "An experimental exploration of Marsaglia's xorshift generators"). */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t value = *state;
    value ^= value >> 12;
    value ^= value << 25;
    value ^= value >> 27;
    *state = value;
    return value * 0x2545f4914f6cdd1d;
}

/* One step of a running checksum. */
static inline uint64_t checksum_mix(uint64_t checksum, uint64_t value)
{
    checksum = (checksum ^ value) * 0x9e3779b97f4a7c15;
    return checksum ^ (checksum >> 32);
}

/* Prints "name: " and the words in hexadecimal, `digits` each. */
void report(const char *name, const uint64_t *words, size_t count, unsigned digits);

#endif
