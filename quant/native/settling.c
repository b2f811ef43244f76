/* Settling the codes of one group of inputs: the inner loops of GPTQ and of its refinement, for many outputs at a time.
   quant/method/settling.py holds the twin and says what each step is for; quant/native/settling.py calls this.

   Matrices have inputs along their first axis and `outputs` values along the second. Outputs do not influence each
   other: each lane computes one output by the same operations in the same order, whatever its neighbours. */
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "vectors.h"

/* Outputs that go through together: enough independent sums to keep the multipliers busy. */
#define TILE_VECTORS 4
#define TILE (TILE_VECTORS * VL)
#define SMALLEST_SCALE 0x1p-20f /* quant.method.scales.MIN_SCALE */

typedef struct {
    vf lanes[TILE_VECTORS];
} Tile;

static Tile *allocate_tiles(int count) {
    Tile *tiles = aligned_alloc(64, sizeof(Tile) * (size_t)count);
    if (!tiles) abort();
    return tiles;
}

/* `width` <= TILE values, the rest filled with `filler`. */
static Tile load_tile(const float *from, int width, float filler) {
    Tile tile;
    float values[TILE];
    if (width == TILE) {
        memcpy(&tile, from, sizeof tile);
        return tile;
    }
    for (int i = 0; i < TILE; i++) values[i] = i < width ? from[i] : filler;
    memcpy(&tile, values, sizeof tile);
    return tile;
}

static void store_tile(float *to, const Tile *tile, int width) { memcpy(to, tile, sizeof(float) * (size_t)width); }

static Tile load_codes(const uint8_t *from, int width) {
    Tile tile;
    float values[TILE];
    for (int i = 0; i < TILE; i++) values[i] = i < width ? from[i] : 0;
    memcpy(&tile, values, sizeof tile);
    return tile;
}

static void store_codes(uint8_t *to, const Tile *tile, int width) {
    float values[TILE];
    memcpy(values, tile, sizeof values);
    for (int i = 0; i < width; i++) to[i] = (uint8_t)values[i];
}

INLINE vf vf_clamp(vf x, vf lowest, vf highest) { return vf_min(vf_max(x, lowest), highest); }
INLINE vf vf_minus(vf x) { return vf_sub(vf_set1(0.0f), x); }

/* quant.method.scales.storable_scale, but too large a scale becomes infinite. */
static vf storable(vf scale, int bits) {
    const vf magnitude = vf_max(vf_abs(scale), vf_set1(SMALLEST_SCALE));
    const vf value = vf_where_less(scale, vf_set1(0.0f), vf_minus(magnitude), magnitude);
    return vf_as_fp16(bits == 4 ? vf_as_bf16(value) : value);
}

/* sums[v] + factors[0] * rows[0].lanes[v] + ... */
INLINE void add_products(Tile *sums, const float *factors, const Tile *rows, int count) {
    for (int j = 0; j < count; j++) {
        const vf factor = vf_set1(factors[j]);
        for (int v = 0; v < TILE_VECTORS; v++) sums->lanes[v] = vf_fma(factor, rows[j].lanes[v], sums->lanes[v]);
    }
}

/* ---- The grid of least error ---- */

typedef struct {
    vf scale, zero;
} Grid;

static Grid symmetric_grid(vf highest, vf lowest, int bits, int candidate, const float *shrinkages, int num_shrinkages) {
    const float middle = (float)(1 << (bits - 1));
    const vf widest = vf_max(highest, vf_minus(lowest));
    vf scale;
    if (num_shrinkages == 0) scale = vf_div(widest, vf_set1(middle - 0.5f));
    else if (candidate == num_shrinkages) scale = vf_div(widest, vf_set1(middle - 1.0f));
    else {
        const vf farthest = vf_where_less(vf_minus(lowest), highest, vf_minus(highest), vf_minus(lowest));
        scale = vf_mul(vf_div(farthest, vf_set1(middle)), vf_set1(shrinkages[candidate]));
    }
    return (Grid){storable(scale, bits), vf_set1(middle)};
}

static Grid asymmetric_grid(vf highest, vf lowest, int bits, float shrinkage) {
    const vf top = vf_set1((float)((1 << bits) - 1)), by = vf_set1(shrinkage), none = vf_set1(0.0f);
    const vf up = vf_mul(vf_max(highest, none), by), down = vf_mul(vf_minus(vf_min(lowest, none)), by);
    const vf steps = vf_max(vf_div(vf_add(up, down), top), vf_set1(SMALLEST_SCALE));
    const vf zero = vf_clamp(vf_round(vf_div(down, steps)), vf_set1(1.0f), top);
    const vf scale = vf_max(steps, vf_div(up, vf_add(vf_sub(top, zero), vf_set1(0.5f))));
    return (Grid){storable(scale, bits), zero};
}

static vf error_on(Grid grid, const Tile *group, int v, const float *importance, int size, int bits) {
    const vf top = vf_set1((float)((1 << bits) - 1)), none = vf_set1(0.0f);
    vf error = none;
    for (int i = 0; i < size; i++) {
        const vf weight = group[i].lanes[v];
        const vf code = vf_clamp(vf_add(vf_round(vf_div(weight, grid.scale)), grid.zero), none, top);
        const vf away = vf_sub(vf_mul(vf_sub(code, grid.zero), grid.scale), weight);
        error = vf_fma(vf_mul(away, away), vf_set1(importance[i]), error);
    }
    return error;
}

static Grid best_grid(const Tile *group, int v, const float *importance, int size, int bits, int is_symmetric,
                      const float *shrinkages, int num_shrinkages) {
    vf highest = vf_set1(-FLT_MAX), lowest = vf_set1(FLT_MAX), least = vf_set1(INFINITY);
    for (int i = 0; i < size; i++) {
        highest = vf_max(highest, group[i].lanes[v]);
        lowest = vf_min(lowest, group[i].lanes[v]);
    }
    const int num_candidates = num_shrinkages == 0 ? 1 : num_shrinkages + (is_symmetric ? 1 : 0);
    Grid best = {vf_set1(1.0f), vf_set1(0.0f)};
    for (int i = 0; i < num_candidates; i++) {
        const Grid grid = is_symmetric ? symmetric_grid(highest, lowest, bits, i, shrinkages, num_shrinkages)
                                       : asymmetric_grid(highest, lowest, bits, num_shrinkages ? shrinkages[i] : 1.0f);
        if (i == 0) best = grid;
        if (num_candidates == 1) break;
        const vf error = error_on(grid, group, v, importance, size, bits);
        best.scale = vf_where_less(error, least, grid.scale, best.scale);
        best.zero = vf_where_less(error, least, grid.zero, best.zero);
        least = vf_where_less(error, least, error, least);
    }
    return best;
}

/* group: (size, outputs); importance: (size); scale, zero: (outputs), written. No shrinkages: no search. */
void causerie_find_grid(const float *group, const float *importance, int size, int outputs, int bits, int is_symmetric,
                        const float *shrinkages, int num_shrinkages, float *scale, float *zero) {
    Tile *weights = allocate_tiles(size);
    for (int first = 0; first < outputs; first += TILE) {
        const int width = outputs - first < TILE ? outputs - first : TILE;
        for (int i = 0; i < size; i++) weights[i] = load_tile(group + (int64_t)i * outputs + first, width, 1.0f);
        Tile scales, zeros;
        for (int v = 0; v < TILE_VECTORS; v++) {
            const Grid grid = best_grid(weights, v, importance, size, bits, is_symmetric, shrinkages, num_shrinkages);
            scales.lanes[v] = grid.scale;
            zeros.lanes[v] = grid.zero;
        }
        store_tile(scale + first, &scales, width);
        store_tile(zero + first, &zeros, width);
    }
    free(weights);
}

/* ---- GPTQ within a block ---- */

/* columns: (count, outputs); lower: (count, count), rows `stride` apart, of which the diagonal and what is before it is
   read; scale, zero: (outputs); codes, errors: (count, outputs), written. */
void causerie_feed_back(const float *columns, const float *lower, int64_t stride, int count, int outputs,
                        const float *scale, const float *zero, int bits, uint8_t *codes, float *errors) {
    const vf top = vf_set1((float)((1 << bits) - 1)), none = vf_set1(0.0f);
    Tile *minus_errors = allocate_tiles(count);
    for (int first = 0; first < outputs; first += TILE) {
        const int width = outputs - first < TILE ? outputs - first : TILE;
        const Tile scales = load_tile(scale + first, width, 1.0f), zeros = load_tile(zero + first, width, 0.0f);
        for (int i = 0; i < count; i++) {
            const int64_t at = (int64_t)i * outputs + first;
            const float *row = lower + (int64_t)i * stride;
            const vf by_diagonal = vf_set1(row[i]);
            Tile weight = load_tile(columns + at, width, 0.0f), code, error;
            add_products(&weight, row, minus_errors, i);
            for (int v = 0; v < TILE_VECTORS; v++) {
                const vf steps = vf_round(vf_div(weight.lanes[v], scales.lanes[v]));
                code.lanes[v] = vf_clamp(vf_add(steps, zeros.lanes[v]), none, top);
                const vf reached = vf_mul(vf_sub(code.lanes[v], zeros.lanes[v]), scales.lanes[v]);
                error.lanes[v] = vf_div(vf_sub(weight.lanes[v], reached), by_diagonal);
                minus_errors[i].lanes[v] = vf_minus(error.lanes[v]);
            }
            store_codes(codes + at, &code, width);
            store_tile(errors + at, &error, width);
        }
    }
    free(minus_errors);
}

/* ---- Refinement of a group ---- */

/* Moves the scales to the least-squares fit of their steps, and slopes with them. moved: what the Hessian makes of the
   steps, (size). */
static void refit_scales(Tile *scales, const Tile *steps, Tile *slopes, Tile *moved, const float *hessian,
                         int64_t stride, int size, int bits) {
    const vf none = vf_set1(0.0f);
    Tile gain, curvature;
    for (int v = 0; v < TILE_VECTORS; v++) gain.lanes[v] = curvature.lanes[v] = none;
    for (int i = 0; i < size; i++) {
        for (int v = 0; v < TILE_VECTORS; v++) moved[i].lanes[v] = none;
        add_products(&moved[i], hessian + (int64_t)i * stride, steps, size);
        for (int v = 0; v < TILE_VECTORS; v++) {
            gain.lanes[v] = vf_fma(steps[i].lanes[v], slopes[i].lanes[v], gain.lanes[v]);
            curvature.lanes[v] = vf_fma(steps[i].lanes[v], moved[i].lanes[v], curvature.lanes[v]);
        }
    }
    for (int v = 0; v < TILE_VECTORS; v++) {
        const vf scale = scales->lanes[v], bend = vf_max(curvature.lanes[v], vf_set1(FLT_MIN));
        vf fitted = vf_add(scale, vf_div(gain.lanes[v], bend));
        fitted = vf_where_less(none, vf_mul(fitted, scale), fitted, scale);
        fitted = vf_where_less(vf_abs(fitted), vf_mul(vf_set1(2.0f), vf_abs(scale)), fitted, scale);
        vf change = vf_sub(storable(fitted, bits), scale);
        const vf worse = vf_mul(change, vf_sub(vf_mul(change, bend), vf_mul(vf_set1(2.0f), gain.lanes[v])));
        change = vf_where_less(worse, none, change, none);
        scales->lanes[v] = vf_add(scale, change);
        for (int i = 0; i < size; i++)
            slopes[i].lanes[v] = vf_sub(slopes[i].lanes[v], vf_mul(moved[i].lanes[v], change));
    }
}

/* Settles one input after another. minus_moves: of the weights, written. */
static void descend(const Tile *scales, const Tile *zeros, Tile *steps, const Tile *slopes, Tile *minus_moves,
                    const float *hessian, int64_t stride, int size, int bits) {
    const vf top = vf_set1((float)((1 << bits) - 1));
    for (int i = 0; i < size; i++) {
        const float *row = hessian + (int64_t)i * stride;
        const vf inverse = vf_set1(row[i] > 0.0f ? 1.0f / row[i] : 1.0f);
        Tile slope = slopes[i];
        add_products(&slope, row, minus_moves, i);
        for (int v = 0; v < TILE_VECTORS; v++) {
            const vf scale = scales->lanes[v], lowest = vf_minus(zeros->lanes[v]);
            const vf before = vf_mul(steps[i].lanes[v], scale);
            const vf best = vf_round(vf_div(vf_fma(slope.lanes[v], inverse, before), scale));
            steps[i].lanes[v] = vf_clamp(best, lowest, vf_add(lowest, top));
            minus_moves[i].lanes[v] = vf_sub(before, vf_mul(steps[i].lanes[v], scale));
        }
    }
}

/* codes: (size, outputs) and scale: (outputs), changed; zero: (outputs); slope: (size, outputs); hessian: (size, size),
   rows `stride` apart; moved: (size, outputs), written: by how much the weights changed. */
void causerie_refine_group(uint8_t *codes, float *scale, const float *zero, const float *slope, const float *hessian,
                           int64_t stride, int size, int outputs, int bits, float *moved) {
    Tile *steps = allocate_tiles(3 * size), *slopes = steps + size, *moves = slopes + size;
    for (int first = 0; first < outputs; first += TILE) {
        const int width = outputs - first < TILE ? outputs - first : TILE;
        Tile scales = load_tile(scale + first, width, 1.0f);
        const Tile zeros = load_tile(zero + first, width, 0.0f), old_scales = scales;
        for (int i = 0; i < size; i++) {
            const int64_t at = (int64_t)i * outputs + first;
            const Tile code = load_codes(codes + at, width);
            slopes[i] = load_tile(slope + at, width, 0.0f);
            for (int v = 0; v < TILE_VECTORS; v++) steps[i].lanes[v] = vf_sub(code.lanes[v], zeros.lanes[v]);
        }
        refit_scales(&scales, steps, slopes, moves, hessian, stride, size, bits);
        descend(&scales, &zeros, steps, slopes, moves, hessian, stride, size, bits);
        for (int i = 0; i < size; i++) {
            const int64_t at = (int64_t)i * outputs + first;
            const Tile before = load_codes(codes + at, width);
            Tile code, move;
            for (int v = 0; v < TILE_VECTORS; v++) {
                code.lanes[v] = vf_add(steps[i].lanes[v], zeros.lanes[v]);
                const vf old = vf_mul(vf_sub(before.lanes[v], zeros.lanes[v]), old_scales.lanes[v]);
                move.lanes[v] = vf_sub(vf_mul(steps[i].lanes[v], scales.lanes[v]), old);
            }
            store_codes(codes + at, &code, width);
            store_tile(moved + at, &move, width);
        }
        store_tile(scale + first, &scales, width);
    }
    free(steps);
}
