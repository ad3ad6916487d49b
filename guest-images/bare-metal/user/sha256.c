/* SHA-256 (FIPS 180-4) over a buffer, the digest fed back into it. */

#include "program.h"

#define BUFFER_BYTES 32768 /* two million instructions, about */
#define BLOCK_BYTES 64
#define WORDS 8
#define SHORT_BUFFER_BYTES 128 /* two blocks */
#define BUFFERS_PER_SCALE 2
#define DIGEST_OF_64_ZEROS 0xf5a5fd42 /* the first word; any other implementation tells it */

/* The first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint8_t buffer[BUFFER_BYTES];

static uint32_t rotate_right(uint32_t value, unsigned count)
{
    return value >> count | value << (32 - count);
}

static uint32_t load_big_endian(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static void digest_start(uint32_t digest[WORDS])
{
    static const uint32_t square_roots[WORDS] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    for (unsigned word = 0; word < WORDS; word++)
        digest[word] = square_roots[word];
}

static void digest_block(uint32_t digest[WORDS], const uint8_t *block)
{
    uint32_t schedule[64];
    for (unsigned at = 0; at < 16; at++)
        schedule[at] = load_big_endian(block + 4 * at);
    for (unsigned at = 16; at < 64; at++) {
        uint32_t early = schedule[at - 15], late = schedule[at - 2];
        uint32_t sigma0 = rotate_right(early, 7) ^ rotate_right(early, 18) ^ early >> 3;
        uint32_t sigma1 = rotate_right(late, 17) ^ rotate_right(late, 19) ^ late >> 10;
        schedule[at] = schedule[at - 16] + sigma0 + schedule[at - 7] + sigma1;
    }
    uint32_t a = digest[0], b = digest[1], c = digest[2], d = digest[3];
    uint32_t e = digest[4], f = digest[5], g = digest[6], h = digest[7];
    for (unsigned at = 0; at < 64; at++) {
        uint32_t sum1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
        uint32_t first = h + sum1 + ((e & f) ^ (~e & g)) + round_constants[at] + schedule[at];
        uint32_t sum0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
        uint32_t second = sum0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first;
        d = c, c = b, b = a, a = first + second;
    }
    digest[0] += a, digest[1] += b, digest[2] += c, digest[3] += d;
    digest[4] += e, digest[5] += f, digest[6] += g, digest[7] += h;
}

/* A message of whole blocks. */
static void digest_message(uint32_t digest[WORDS], const uint8_t *message, uint32_t bytes)
{
    digest_start(digest);
    for (uint32_t at = 0; at < bytes; at += BLOCK_BYTES)
        digest_block(digest, message + at);
    uint8_t padding[BLOCK_BYTES] = { 0x80 };
    uint64_t bits = (uint64_t)bytes * 8;
    for (unsigned at = 0; at < 8; at++)
        padding[BLOCK_BYTES - 1 - at] = (uint8_t)(bits >> 8 * at);
    digest_block(digest, padding);
}

bool stage_sha256(uint32_t scale)
{
    uint32_t digest[WORDS];
    digest_message(digest, buffer, BLOCK_BYTES);
    if (digest[0] != DIGEST_OF_64_ZEROS)
        return false;
    uint64_t seed = 0x5eed0001;
    uint32_t buffer_bytes = scale == 0 ? SHORT_BUFFER_BYTES : BUFFER_BYTES;
    uint64_t turns = scale == 0 ? 1 : (uint64_t)scale * BUFFERS_PER_SCALE;
    for (uint32_t at = 0; at < buffer_bytes; at++)
        buffer[at] = (uint8_t)(random_next(&seed) >> 56);
    for (uint64_t turn = 0; turn < turns; turn++) {
        digest_message(digest, buffer, buffer_bytes);
        for (uint32_t at = 0; at < 4 * WORDS; at++)
            buffer[at] ^= (uint8_t)(digest[at / 4] >> 8 * (at % 4));
        system_yield();
    }
    uint64_t words[WORDS];
    for (unsigned word = 0; word < WORDS; word++)
        words[word] = digest[word];
    report("sha256", words, WORDS, 8);
    return true;
}
