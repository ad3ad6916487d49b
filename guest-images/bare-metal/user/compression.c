/* A byte-oriented LZ77: a hash of three bytes finds one earlier place, greedily. The packed form is a
 * row of items: a control byte below 0x80 and that many plus one literal bytes, or a control byte
 * from 0x80 (length minus MATCH_MIN) and two bytes of distance. What was packed is unpacked and
 * compared. */

#include "program.h"

#define TEXT_BYTES 32768
#define SHORT_TEXT_BYTES 256
#define PACKED_BYTES (TEXT_BYTES + TEXT_BYTES / 128 + 16)
#define HASH_BITS 12
#define LITERALS_MAX 128
#define MATCH_FLAG 0x80
#define MATCH_MIN 4
#define MATCH_MAX (MATCH_MIN + 127)
#define TURNS_PER_SCALE 2 /* of two million instructions, about */

static uint8_t text[TEXT_BYTES], unpacked[TEXT_BYTES], packed[PACKED_BYTES];
static size_t text_bytes; /* of TEXT_BYTES */
static uint32_t places[1 << HASH_BITS]; /* the place plus one; zero for none */

/* Words of a small vocabulary, the frequent ones much more frequent. */
static void write_text(uint64_t *seed)
{
    size_t at = 0;
    while (at < text_bytes) {
        uint64_t random = random_next(seed);
        uint64_t word = (random & 0xff) & (random >> 8 & 0xff);
        size_t letters = 2 + word % 9;
        for (size_t letter = 0; letter < letters && at < text_bytes; letter++)
            text[at++] = (uint8_t)('a' + (word * 7 + letter * (word + 3)) % 26);
        if (at < text_bytes)
            text[at++] = (random >> 16 & 15) == 0 ? '\n' : ' ';
    }
}

static uint32_t hash_at(const uint8_t *bytes)
{
    uint32_t three = (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16;
    return three * 0x9e3779b1 >> (32 - HASH_BITS);
}

static size_t match_length(size_t earlier, size_t at)
{
    size_t length = 0;
    while (at + length < text_bytes && length < MATCH_MAX
        && text[earlier + length] == text[at + length])
        length++;
    return length;
}

static size_t put_literals(size_t out, size_t from, size_t to)
{
    while (from < to) {
        size_t count = to - from < LITERALS_MAX ? to - from : LITERALS_MAX;
        packed[out++] = (uint8_t)(count - 1);
        for (size_t end = from + count; from < end; from++)
            packed[out++] = text[from];
    }
    return out;
}

static size_t pack(void)
{
    for (size_t at = 0; at < 1 << HASH_BITS; at++)
        places[at] = 0;
    size_t out = 0, literals_from = 0, at = 0;
    while (at + MATCH_MIN <= text_bytes) {
        uint32_t *place = &places[hash_at(text + at)];
        size_t earlier = *place, length = 0;
        *place = (uint32_t)at + 1;
        if (earlier != 0)
            length = match_length(earlier - 1, at);
        if (length < MATCH_MIN) {
            at++;
            continue;
        }
        size_t distance = at - (earlier - 1);
        out = put_literals(out, literals_from, at);
        packed[out++] = (uint8_t)(MATCH_FLAG | (length - MATCH_MIN));
        packed[out++] = (uint8_t)distance;
        packed[out++] = (uint8_t)(distance >> 8);
        at += length;
        literals_from = at;
    }
    return put_literals(out, literals_from, text_bytes);
}

/* False if the packed form makes no sense. */
static bool unpack(size_t packed_bytes)
{
    size_t in = 0, out = 0;
    while (in < packed_bytes) {
        uint8_t control = packed[in++];
        size_t count, distance = 0;
        if (control < MATCH_FLAG) {
            count = (size_t)control + 1;
        } else {
            count = (size_t)(control & ~MATCH_FLAG) + MATCH_MIN;
            distance = packed[in] | (size_t)packed[in + 1] << 8;
            in += 2;
            if (distance == 0 || distance > out)
                return false;
        }
        if (count > text_bytes - out)
            return false;
        for (size_t end = out + count; out < end; out++)
            unpacked[out] = distance == 0 ? packed[in++] : unpacked[out - distance];
    }
    return out == text_bytes;
}

bool stage_compression(uint32_t scale)
{
    uint64_t seed = 0x5eed0005, checksum = 0;
    uint64_t turns = scale == 0 ? 1 : (uint64_t)scale * TURNS_PER_SCALE;
    text_bytes = scale == 0 ? SHORT_TEXT_BYTES : TEXT_BYTES;
    for (uint64_t turn = 0; turn < turns; turn++) {
        write_text(&seed);
        size_t packed_bytes = pack();
        if (!unpack(packed_bytes))
            return false;
        for (size_t at = 0; at < text_bytes; at++) {
            if (unpacked[at] != text[at])
                return false;
        }
        checksum = checksum_mix(checksum, packed_bytes);
        for (size_t at = 0; at < packed_bytes; at++)
            checksum = checksum_mix(checksum, packed[at]);
        system_yield();
    }
    report("compression", &checksum, 1, 16);
    return true;
}
