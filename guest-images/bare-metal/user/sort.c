/* Quicksort of random numbers, insertion sort for the short runs that it leaves. */

#include "program.h"

#define NUMBERS 16384 /* almost three million instructions */
#define FEW_NUMBERS 64
#define SHORT_RUN 12
#define SORTS_PER_SCALE 2

static uint32_t numbers[NUMBERS];

static void swap(uint32_t *left, uint32_t *right)
{
    uint32_t kept = *left;
    *left = *right;
    *right = kept;
}

static void insertion_sort(uint32_t *first, size_t count)
{
    for (size_t at = 1; at < count; at++) {
        uint32_t number = first[at];
        size_t hole = at;
        while (hole > 0 && first[hole - 1] > number) {
            first[hole] = first[hole - 1];
            hole--;
        }
        first[hole] = number;
    }
}

/* Recurses into the shorter half only, so that the stack stays small. */
static void quicksort(uint32_t *first, size_t count)
{
    while (count > SHORT_RUN) {
        uint32_t pivot = first[count / 2];
        size_t left = 0, right = count - 1;
        for (;;) {
            while (first[left] < pivot)
                left++;
            while (first[right] > pivot)
                right--;
            if (left >= right)
                break;
            swap(&first[left++], &first[right--]);
        }
        size_t lower = right + 1;
        if (lower < count - lower) {
            quicksort(first, lower);
            first += lower;
            count -= lower;
        } else {
            quicksort(first + lower, count - lower);
            count = lower;
        }
    }
    insertion_sort(first, count);
}

bool stage_sort(uint32_t scale)
{
    uint64_t seed = 0x5eed0002, checksum = 0;
    size_t count = scale == 0 ? FEW_NUMBERS : NUMBERS;
    uint64_t turns = scale == 0 ? 1 : (uint64_t)scale * SORTS_PER_SCALE;
    for (uint64_t turn = 0; turn < turns; turn++) {
        for (size_t at = 0; at < count; at++)
            numbers[at] = (uint32_t)(random_next(&seed) >> 32);
        quicksort(numbers, count);
        for (size_t at = 0; at < count; at++) {
            if (at > 0 && numbers[at - 1] > numbers[at])
                return false;
            checksum = checksum_mix(checksum, numbers[at]);
        }
        system_yield();
    }
    report("sort", &checksum, 1, 16);
    return true;
}
