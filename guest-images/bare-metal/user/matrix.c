/* Products of square matrices of doubles, two at a time in SSE2 registers. Sums go in one fixed order
 * and nothing is fused, so the result is the same to the bit wherever it runs. */

#include "program.h"

#define SIDE 64
#define SHORT_SIDE 8
#define PRODUCTS_PER_SCALE 3 /* of almost two million instructions */

typedef double pair __attribute__((vector_size(16)));

static pair left[SIDE][SIDE / 2], right[SIDE][SIDE / 2], product[SIDE][SIDE / 2];

/* Each side has a copy of its own, whose loops have constant bounds. */
#define EACH_SIDE static inline __attribute__((always_inline))

EACH_SIDE void multiply(size_t side)
{
    for (size_t row = 0; row < side; row++) {
        for (size_t column = 0; column < side / 2; column++) {
            pair sum = { 0, 0 };
            for (size_t at = 0; at < side; at++) {
                double factor = left[row][at / 2][at % 2];
                pair factors = { factor, factor };
                sum += factors * right[at][column];
            }
            product[row][column] = sum;
        }
    }
}

/* The product becomes the next left factor, scaled so that it neither grows nor dies out. */
EACH_SIDE void feed_back(size_t side)
{
    for (size_t row = 0; row < side; row++) {
        double largest = 1e-300;
        for (size_t column = 0; column < side; column++) {
            double value = product[row][column / 2][column % 2];
            double size = value < 0 ? -value : value;
            largest = size > largest ? size : largest;
        }
        pair scale = { largest, largest };
        for (size_t column = 0; column < side / 2; column++)
            left[row][column] = product[row][column] / scale;
    }
}

EACH_SIDE void fill(pair matrix[SIDE][SIDE / 2], size_t side, uint64_t seed)
{
    for (size_t row = 0; row < side; row++) {
        for (size_t column = 0; column < side; column++) {
            double value = (double)(int64_t)(random_next(&seed) >> 32) - 2147483648.0;
            matrix[row][column / 2][column % 2] = value / 2147483648.0;
        }
    }
}

EACH_SIDE bool multiply_repeatedly(size_t side, uint64_t turns)
{
    fill(left, side, 0x5eed0003);
    fill(right, side, 0x5eed0004);
    for (uint64_t turn = 0; turn < turns; turn++) {
        multiply(side);
        feed_back(side);
        system_yield();
    }
    uint64_t checksum = 0;
    for (size_t row = 0; row < side; row++) {
        for (size_t column = 0; column < side; column++) {
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

bool stage_matrix(uint32_t scale)
{
    if (scale == 0)
        return multiply_repeatedly(SHORT_SIDE, 1);
    return multiply_repeatedly(SIDE, (uint64_t)scale * PRODUCTS_PER_SCALE);
}
