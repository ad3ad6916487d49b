/* Products of square matrices of doubles, two at a time in SSE2 registers. Sums go in one fixed order
 * and nothing is fused, so the result is the same to the bit wherever it runs. */

#include "program.h"

#define SIDE 64
#define PRODUCTS_PER_SCALE 3 /* of almost two million instructions */

typedef double pair __attribute__((vector_size(16)));

static pair left[SIDE][SIDE / 2], right[SIDE][SIDE / 2], product[SIDE][SIDE / 2];

static void multiply(void)
{
    for (size_t row = 0; row < SIDE; row++) {
        for (size_t column = 0; column < SIDE / 2; column++) {
            pair sum = { 0, 0 };
            for (size_t at = 0; at < SIDE; at++) {
                double factor = left[row][at / 2][at % 2];
                pair factors = { factor, factor };
                sum += factors * right[at][column];
            }
            product[row][column] = sum;
        }
    }
}

/* The product becomes the next left factor, scaled so that it neither grows nor dies out. */
static void feed_back(void)
{
    for (size_t row = 0; row < SIDE; row++) {
        double largest = 1e-300;
        for (size_t column = 0; column < SIDE; column++) {
            double value = product[row][column / 2][column % 2];
            double size = value < 0 ? -value : value;
            largest = size > largest ? size : largest;
        }
        pair scale = { largest, largest };
        for (size_t column = 0; column < SIDE / 2; column++)
            left[row][column] = product[row][column] / scale;
    }
}

static void fill(pair matrix[SIDE][SIDE / 2], uint64_t seed)
{
    for (size_t row = 0; row < SIDE; row++) {
        for (size_t column = 0; column < SIDE; column++) {
            double value = (double)(int64_t)(random_next(&seed) >> 32) - 2147483648.0;
            matrix[row][column / 2][column % 2] = value / 2147483648.0;
        }
    }
}

bool stage_matrix(uint32_t scale)
{
    fill(left, 0x5eed0003);
    fill(right, 0x5eed0004);
    for (uint64_t turn = 0; turn < (uint64_t)scale * PRODUCTS_PER_SCALE; turn++) {
        multiply();
        feed_back();
        system_yield();
    }
    uint64_t checksum = 0;
    for (size_t row = 0; row < SIDE; row++) {
        for (size_t column = 0; column < SIDE; column++) {
            union {
                double value;
                uint64_t bits;
            } number = { .value = left[row][column / 2][column % 2] };
            if (!(number.value >= -1 && number.value <= 1))
                return false;
            checksum = checksum_mix(checksum, number.bits);
        }
    }
    report("matrix", &checksum, 1, 16);
    return true;
}
