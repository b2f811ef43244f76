/* Groups of 8-bit codes that lie on at most 16 evenly spaced levels, as those of a model do that had 4 bits before.
   quant/native/levels.py says why, and holds the twin. */
#include <float.h>

#include "kernels.h"
#include "vectors.h"

#define LEVELS 16
/* Codes are rounded levels: on the right levels the mean squared distance is 1/12, and a little more after GPTQ. */
#define GOOD_ENOUGH 0.13f
#define REFINEMENTS 2
#define LARGEST_GROUP 1024

typedef struct {
    const uint8_t *codes;  /* (groups, size) */
    uint8_t *levels;       /* (groups, size) 0..15 */
    float *steps, *lowest; /* (groups): in codes */
    float *errors;         /* (groups): summed squared distances of codes from their levels */
    float *sums, *squares; /* (groups): of codes */
    int size;
} Search;

INLINE vf level_of(vf value, vf lowest, vf inverse) {
    return vf_min(vf_max(vf_round(vf_mul(vf_sub(value, lowest), inverse)), vf_set1(0.0f)), vf_set1(LEVELS - 1.0f));
}

/* Least squares of lowest + level * step through the values, their levels taken from the line as it is. */
static void refine(const float *values, int size, float *lowest, float *step) {
    vf q = vf_set1(0.0f), qq = q, v = q, qv = q;
    const vf from = vf_set1(*lowest), inverse = vf_set1(1.0f / *step);
    for (int i = 0; i < size; i += VL) {
        const vf value = vf_load(values + i), level = level_of(value, from, inverse);
        q = vf_add(q, level);
        qq = vf_fma(level, level, qq);
        v = vf_add(v, value);
        qv = vf_fma(level, value, qv);
    }
    const float mean_q = vf_sum(q) / size, mean_v = vf_sum(v) / size;
    const float variance = vf_sum(qq) / size - mean_q * mean_q;
    const float slope = variance > 0.0f ? (vf_sum(qv) / size - mean_q * mean_v) / variance : 0.0f;
    if (slope > 0.0f) *step = slope;
    *lowest = mean_v - *step * mean_q;
}

static float squared_error(const float *values, int size, float lowest, float step) {
    vf sum = vf_set1(0.0f);
    const vf from = vf_set1(lowest), width = vf_set1(step), inverse = vf_set1(1.0f / step);
    for (int i = 0; i < size; i += VL) {
        const vf value = vf_load(values + i);
        const vf away = vf_sub(value, vf_fma(level_of(value, from, inverse), width, from));
        sum = vf_fma(away, away, sum);
    }
    return vf_sum(sum);
}

static void search_group(Search *s, int group) {
    const int size = s->size;
    float values[LARGEST_GROUP], low = FLT_MAX, high = -FLT_MAX, sum = 0.0f, squares = 0.0f;
    for (int i = 0; i < size; i++) {
        values[i] = s->codes[(int64_t)group * size + i];
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
        sum += values[i];
        squares += values[i] * values[i];
    }
    float best = FLT_MAX, best_low = low, best_step = 1.0f;
    for (int steps = LEVELS - 1; steps > 0 && best > GOOD_ENOUGH * size; steps--) {
        float lowest = low, step = high > low ? (high - low) / steps : 1.0f;
        for (int i = 0; i < REFINEMENTS; i++) refine(values, size, &lowest, &step);
        const float error = squared_error(values, size, lowest, step);
        if (error < best) {
            best = error;
            best_low = lowest;
            best_step = step;
        }
    }
    s->sums[group] = sum;
    s->squares[group] = squares;
    s->errors[group] = best;
    s->lowest[group] = best_low;
    s->steps[group] = best_step;
    for (int i = 0; i < size; i += VL) {
        float at[VL];
        vf_store(at, level_of(vf_load(values + i), vf_set1(best_low), vf_set1(1.0f / best_step)));
        for (int j = 0; j < VL; j++) s->levels[(int64_t)group * size + i + j] = (uint8_t)at[j];
    }
}

static void search_groups(void *context, int first, int last) {
    for (int group = first; group < last; group++) search_group(context, group);
}

/* size: a multiple of VL, at most LARGEST_GROUP. */
void causerie_find_levels(const uint8_t *codes, int groups, int size, uint8_t *levels, float *steps, float *lowest,
                          float *errors, float *sums, float *squares, int threads) {
    enter(threads);
    Search s = {codes, levels, steps, lowest, errors, sums, squares, size};
    run_parallel(search_groups, &s, groups, 64);
    leave();
}
