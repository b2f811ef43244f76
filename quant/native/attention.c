#include "attention.h"

#include <math.h>
#include <stdatomic.h>

#include "kernels.h"
#include "vectors.h"

/* A context is attended to in chunks of so many tokens, whatever the step holds. Each gives a partial softmax; those of
   a row are merged in the order of the context: arXiv:2205.14135, section 3.1. */
#define CHUNK 128
/* Neighbouring rows of a sequence share what is made of a chunk's keys and values. */
#define TILE_QUERIES 96
/* In a tile of at most so many rows every chunk is an item of its own: one long context keeps all threads busy. */
#define SPLIT_ROWS 8
#define PREFETCH_TOKENS 32
/* Slots that follow each other where whole texts are attended to; a block is read as a whole. */
#define TEXT_BLOCK 16

/* Neighbouring rows of one sequence. */
struct Tile {
    int32_t first_row, num_rows, num_chunks, is_split;
    int64_t first_partial;    /* where it is split: of (chunks, rows, heads) */
    _Atomic int32_t num_done; /* where it is split: chunks that are done */
};

/* What a thread does in one go: of a split tile a chunk for all key heads, of another one a key head over all chunks. */
struct Item {
    int32_t tile, which;
};

/* The softmax of one query over a part of its context. In memory they follow each other. */
typedef struct {
    float *largest, *total; /* the largest score; the sum of weights e^(score - largest) */
    float *sums;            /* (head_dim): of weighted values */
} Partial;

enum { SLOT_TILES = 8, SLOT_ITEMS, SLOT_PARTIALS, SLOT_POSITIONS, SLOT_SEQUENCES, SLOT_TABLES };

INLINE int min_int(int a, int b) { return a < b ? a : b; }
INLINE int group_of(const Attention *a) { return a->num_heads / a->num_kv_heads; }
INLINE int partial_size(const Attention *a) { return 2 + a->head_dim; }

INLINE Partial partial_at(const Attention *a, float *first, int64_t index) {
    float *memory = first + index * partial_size(a);
    return (Partial){memory, memory + 1, memory + 2};
}

INLINE const int32_t *table_of(const Attention *a, int row) {
    return a->tables + (int64_t)a->sequences[row] * a->table_width;
}

INLINE int64_t slot_at(const Attention *a, const int32_t *table, int64_t position) {
    return (int64_t)table[position / a->block_size] * a->block_size + position % a->block_size;
}

/* How many of the chunk's tokens the row attends to. */
INLINE int num_visible(const Attention *a, int row, int chunk) {
    const int64_t visible = a->positions[row] + 1 - (int64_t)chunk * CHUNK;
    return visible < 0 ? 0 : visible < CHUNK ? (int)visible : CHUNK;
}

INLINE const float *query_of(const Attention *a, int row, int head) {
    return a->queries + (int64_t)row * a->query_stride + head * a->head_dim;
}

/* Not inlined: it must round alike wherever it is called. */
static __attribute__((noinline)) void merge(Partial into, Partial next, int dim) {
    const float largest = *into.largest > *next.largest ? *into.largest : *next.largest;
    const vf kept = vf_exp(vf_set1(*into.largest - largest)), added = vf_exp(vf_set1(*next.largest - largest));
    const vf total = vf_fma(vf_set1(*next.total), added, vf_mul(vf_set1(*into.total), kept));
    float lanes[VL];
    vf_store(lanes, total);
    *into.largest = largest;
    *into.total = lanes[0];
    for (int i = 0; i < dim; i += VL)
        vf_store(into.sums + i, vf_fma(vf_load(next.sums + i), added, vf_mul(vf_load(into.sums + i), kept)));
}

/* ---- One chunk ---- */

#ifdef __AVX512BF16__

/* Keys and values are laid out once for all queries of a tile: pairs for products that sum in fp32. */
#define BLOCK_QUERIES 6

typedef struct {
    _Alignas(64) uint32_t keys[CHUNK * MAX_HEAD_DIM / 2];      /* (tokens / 16, dim / 2, 16): pairs of dimensions */
    _Alignas(64) uint32_t values[CHUNK * MAX_HEAD_DIM / 2];    /* (tokens / 2, dim): pairs of tokens */
    _Alignas(64) float key_scales[CHUNK], value_scales[CHUNK]; /* of an int8 cache */
} Packed;

/* 32 numbers as bf16, which holds int8 codes exactly. */
INLINE __m512i load_pairs(const char *p, const int is_int8) {
    if (!is_int8) return _mm512_loadu_si512(p);
    return (__m512i)_mm512_cvtne2ps_pbh(vf_load_int8((const int8_t *)p + 16), vf_load_int8((const int8_t *)p));
}

/* rows[i] lane j becomes rows[j] lane i. */
INLINE void transpose(__m512i *rows) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Dimensions of two neighbouring tokens side by side: (32), as two vectors. */
INLINE void pair_tokens(__m512i first, __m512i second, __m512i *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    to[0] = _mm512_permutex2var_epi16(first, low, second);
    to[1] = _mm512_permutex2var_epi16(first, _mm512_add_epi16(low, _mm512_set1_epi16(16)), second);
}

/* Asks for what is packed some blocks later: of a split tile all heads at once, which lie side by side, of another one
   the head's own lines, whose strides defeat the hardware's prefetcher. */
INLINE void prefetch_block(const Attention *a, const struct Tile *tile, int kv_head, int64_t position) {
    if (position > a->positions[tile->first_row + tile->num_rows - 1]) return;
    const int64_t head_bytes = a->head_dim * (a->scales ? 1 : 2), token_bytes = 2 * a->num_kv_heads * head_bytes;
    const char *block = a->cache + slot_at(a, table_of(a, tile->first_row), position) * token_bytes;
    if (tile->is_split) {
        if (kv_head > 0) return;
        for (int64_t i = 0; i < 16 * token_bytes; i += 64) _mm_prefetch(block + i, _MM_HINT_T1);
        return;
    }
    for (int t = 0; t < 16; t++)
        for (int i = 0; i < head_bytes; i += 64) {
            _mm_prefetch(block + t * token_bytes + kv_head * head_bytes + i, _MM_HINT_T0);
            _mm_prefetch(block + t * token_bytes + token_bytes / 2 + kv_head * head_bytes + i, _MM_HINT_T0);
        }
}

/* A block's last slots may hold nothing yet. Their keys are read, since cache memory is never unmapped, and masked
   later; their values count as zero, for they may be no numbers. */

INLINE const char *head_at(const Attention *a, int64_t slot, int head) {
    return a->cache + (slot * 2 * a->num_kv_heads + head) * a->head_dim * (a->scales ? 1 : 2);
}

/* to: (dim / 2, 16), pairs of dimensions of the 16 tokens from `slot` on. */
INLINE void pack_keys(const Attention *a, int64_t slot, int kv_head, const int is_int8, uint32_t *to) {
    const int dim = a->head_dim, bytes = is_int8 ? 1 : 2, token_bytes = 2 * a->num_kv_heads * dim * bytes;
    const char *keys = head_at(a, slot, kv_head);
    for (int d = 0; d < dim; d += 32) {
        __m512i rows[16];
        for (int t = 0; t < 16; t++) rows[t] = load_pairs(keys + t * token_bytes + d * bytes, is_int8);
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + (d / 2 + i) * 16, rows[i]);
    }
}

/* The 32 dimensions from `values` on of a pair of tokens, of which there may be one. */
INLINE void load_values(const char *values, int64_t token_bytes, int is_pair, const int is_int8, __m512i *to) {
    const __m512i second = is_pair ? load_pairs(values + token_bytes, is_int8) : _mm512_setzero_si512();
    pair_tokens(load_pairs(values, is_int8), second, to);
}

INLINE void load_scales(const Attention *a, int64_t slot, int kv_head, float *of_keys, float *of_values) {
    const uint16_t *scales = a->scales + scale_index(slot, kv_head, a->num_kv_heads, a->block_size);
    vf_store(of_keys, vf_load_bf16(scales));
    vf_store(of_values, vf_load_bf16(scales + a->num_kv_heads * a->block_size));
}

INLINE void pack_chunk(const Attention *a, const struct Tile *tile, int kv_head, int chunk, int count, const int is_int8,
                       Packed *to) {
    const int dim = a->head_dim, bytes = is_int8 ? 1 : 2, token_bytes = 2 * a->num_kv_heads * dim * bytes;
    const int32_t *table = table_of(a, tile->first_row);
    for (int t0 = 0; t0 < count; t0 += 16) {
        const int64_t position = (int64_t)chunk * CHUNK + t0, slot = slot_at(a, table, position);
        const char *values = head_at(a, slot, a->num_kv_heads + kv_head);
        prefetch_block(a, tile, kv_head, position + PREFETCH_TOKENS);
        pack_keys(a, slot, kv_head, is_int8, to->keys + t0 * dim / 2);
        for (int t = 0; t < min_int(16, count - t0); t += 2)
            for (int d = 0; d < dim; d += 32) {
                __m512i pairs[2];
                load_values(values + t * token_bytes + d * bytes, token_bytes, t0 + t + 1 < count, is_int8, pairs);
                _mm512_store_si512(to->values + (t0 + t) / 2 * dim + d, pairs[0]);
                _mm512_store_si512(to->values + (t0 + t) / 2 * dim + d + 16, pairs[1]);
            }
        if (is_int8) load_scales(a, slot, kv_head, to->key_scales + t0, to->value_scales + t0);
    }
}

/* Scores of 16 * `width` tokens. `width` and `num_queries` are constants where this is called. queries: pairs. */
INLINE void score_keys(const uint32_t *keys_from, const int width, const uint32_t *queries, const int num_queries, int dim,
                       float (*scores)[CHUNK], int first) {
    vf sum[BLOCK_QUERIES][4];
    for (int q = 0; q < num_queries; q++)
        for (int w = 0; w < width; w++) sum[q][w] = vf_set1(0.0f);
    for (int pair = 0; pair < dim / 2; pair++) {
        __m512bh keys[4];
        for (int w = 0; w < width; w++)
            keys[w] = (__m512bh)_mm512_load_si512(keys_from + (w * (dim / 2) + pair) * 16);
        for (int q = 0; q < num_queries; q++) {
            const __m512bh query = (__m512bh)_mm512_set1_epi32((int)queries[q * (dim / 2) + pair]);
            for (int w = 0; w < width; w++) sum[q][w] = _mm512_dpbf16_ps(sum[q][w], keys[w], query);
        }
    }
    for (int q = 0; q < num_queries; q++)
        for (int w = 0; w < width; w++) vf_store(scores[q] + first + w * 16, sum[q][w]);
}

/* Scores of `count` tokens and those that fill the last vector. */
INLINE void score_tokens(const uint32_t *keys, int count, const uint32_t *queries, const int num_queries, int dim,
                         float (*scores)[CHUNK], int first) {
    int t = 0;
    for (; t + 48 < count; t += 64) score_keys(keys + t * dim / 2, 4, queries, num_queries, dim, scores, first + t);
    if (t + 16 < count) {
        score_keys(keys + t * dim / 2, 2, queries, num_queries, dim, scores, first + t);
        t += 32;
    }
    if (t < count) score_keys(keys + t * dim / 2, 1, queries, num_queries, dim, scores, first + t);
}

/* 16 * `width` dimensions of the weighted values of `count` tokens. */
INLINE void add_values(const Packed *packed, int first_dim, const int width, int dim, uint16_t (*weights)[CHUNK],
                       const int num_queries, int count, const Partial *to) {
    vf sum[BLOCK_QUERIES][4];
    for (int q = 0; q < num_queries; q++)
        for (int w = 0; w < width; w++) sum[q][w] = vf_set1(0.0f);
    for (int pair = 0; pair < (count + 1) / 2; pair++) {
        __m512bh values[4];
        for (int w = 0; w < width; w++)
            values[w] = (__m512bh)_mm512_load_si512(packed->values + pair * dim + first_dim + 16 * w);
        for (int q = 0; q < num_queries; q++) {
            int32_t both;
            memcpy(&both, weights[q] + 2 * pair, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
            for (int w = 0; w < width; w++) sum[q][w] = _mm512_dpbf16_ps(sum[q][w], values[w], weight);
        }
    }
    for (int q = 0; q < num_queries; q++)
        for (int w = 0; w < width; w++) vf_store(to[q].sums + first_dim + 16 * w, sum[q][w]);
}

/* Makes the first `count` scores weights in bf16, and those behind them, up to `end`, zero. The scales may be null. */
static __attribute__((noinline)) void weigh(float *scores, const float *key_scales, const float *value_scales, int count,
                                            int end, uint16_t *weights, Partial to) {
    vf top = vf_set1(-INFINITY), sum = vf_set1(0.0f);
    for (int t = 0; t < count; t += 16) {
        const __mmask16 is_visible = (__mmask16)(count - t < 16 ? (1 << (count - t)) - 1 : 0xffff);
        vf score = vf_load(scores + t);
        if (key_scales) score = vf_mul(score, vf_load(key_scales + t));
        score = _mm512_mask_mov_ps(vf_set1(-INFINITY), is_visible, score);
        vf_store(scores + t, score);
        top = vf_max(top, score);
    }
    const vf largest = vf_set1(vf_top(top));
    for (int t = 0; t < end; t += 16) {
        const __mmask16 is_visible = (__mmask16)(count - t >= 16 ? 0xffff : count > t ? (1 << (count - t)) - 1 : 0);
        vf weight = _mm512_maskz_mov_ps(is_visible, vf_exp(vf_sub(vf_load(scores + t), largest)));
        sum = vf_add(sum, weight);
        if (key_scales) weight = _mm512_maskz_mul_ps(is_visible, weight, vf_load(value_scales + t));
        _mm256_store_si256((__m256i *)(weights + t), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    *to.largest = vf_top(top);
    *to.total = vf_sum(sum);
}

/* counts: how many tokens each query attends to, at least one and no fewer than the query before it. */
INLINE void attend_block(const Packed *packed, const uint32_t *queries, const int num_queries, const int *counts, int dim,
                         const int is_int8, const Partial *to) {
    _Alignas(64) float scores[BLOCK_QUERIES][CHUNK];
    _Alignas(64) uint16_t weights[BLOCK_QUERIES][CHUNK];
    const int end = counts[num_queries - 1];
    score_tokens(packed->keys, end, queries, num_queries, dim, scores, 0);
    for (int q = 0; q < num_queries; q++)
        weigh(scores[q], is_int8 ? packed->key_scales : 0, packed->value_scales, counts[q], end, weights[q], to[q]);
    int d = 0;
    for (; d + 64 <= dim; d += 64) add_values(packed, d, 4, dim, weights, num_queries, end, to);
    if (d < dim) add_values(packed, d, 2, dim, weights, num_queries, end, to);
}

/* The same for the queries of a single row: what is packed is used once, so it is packed in small parts or not at all. */
INLINE void attend_few(const Attention *a, const struct Tile *tile, int kv_head, int chunk, const uint32_t *queries,
                       const int num_queries, int count, const int is_int8, const Partial *to) {
    const int dim = a->head_dim, bytes = is_int8 ? 1 : 2, token_bytes = 2 * a->num_kv_heads * dim * bytes;
    const int32_t *table = table_of(a, tile->first_row);
    _Alignas(64) uint32_t keys[64 * MAX_HEAD_DIM / 2];
    _Alignas(64) float scores[BLOCK_QUERIES][CHUNK], key_scales[CHUNK], value_scales[CHUNK];
    _Alignas(64) uint16_t weights[BLOCK_QUERIES][CHUNK];
    int64_t slots[CHUNK / 16];
    for (int t0 = 0; t0 < count; t0 += 16) {
        const int64_t position = (int64_t)chunk * CHUNK + t0;
        slots[t0 / 16] = slot_at(a, table, position);
        prefetch_block(a, tile, kv_head, position + PREFETCH_TOKENS);
        pack_keys(a, slots[t0 / 16], kv_head, is_int8, keys + t0 % 64 * dim / 2);
        if (is_int8) load_scales(a, slots[t0 / 16], kv_head, key_scales + t0, value_scales + t0);
        if (t0 % 64 == 48 || t0 + 16 >= count)
            score_tokens(keys, min_int(count - t0 / 64 * 64, 64), queries, num_queries, dim, scores, t0 / 64 * 64);
    }
    for (int q = 0; q < num_queries; q++)
        weigh(scores[q], is_int8 ? key_scales : 0, value_scales, count, count, weights[q], to[q]);
    for (int d = 0; d < dim; d += 32) {
        vf sum[BLOCK_QUERIES][2];
        for (int q = 0; q < num_queries; q++) sum[q][0] = sum[q][1] = vf_set1(0.0f);
        for (int t = 0; t < count; t += 2) {
            const char *values = head_at(a, slots[t / 16] + t % 16, a->num_kv_heads + kv_head) + d * bytes;
            __m512i pairs[2];
            load_values(values, token_bytes, t + 1 < count, is_int8, pairs);
            for (int q = 0; q < num_queries; q++) {
                int32_t both;
                memcpy(&both, weights[q] + t, 4);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                for (int w = 0; w < 2; w++) sum[q][w] = _mm512_dpbf16_ps(sum[q][w], (__m512bh)pairs[w], weight);
            }
        }
        for (int q = 0; q < num_queries; q++)
            for (int w = 0; w < 2; w++) vf_store(to[q].sums + d + 16 * w, sum[q][w]);
    }
}

#define ATTEND(queries)                                                                                         \
    case queries:                                                                                               \
        if (is_single && a->scales) attend_few(a, tile, kv_head, chunk, pairs, queries, counts[0], 1, found);   \
        else if (is_single) attend_few(a, tile, kv_head, chunk, pairs, queries, counts[0], 0, found);           \
        else attend_block(&packed, pairs, queries, counts, dim, a->scales != 0, found);                         \
        break;

/* The tile's rows over one chunk, of one key head. to: (rows, row_partials), the queries of the head first in a row;
   the first of a query's partials is stored there, those that follow are merged. */
static void attend_chunk(const Attention *a, const struct Tile *tile, int kv_head, int chunk, int is_first, float *to,
                         int row_partials) {
    const int dim = a->head_dim, group = group_of(a), num_queries = tile->num_rows * group;
    const vf scale = vf_set1(1.0f / sqrtf((float)dim));
    Packed packed;
    _Alignas(64) uint32_t pairs[BLOCK_QUERIES * MAX_HEAD_DIM / 2];
    float memory[BLOCK_QUERIES * (2 + MAX_HEAD_DIM)];
    Partial found[BLOCK_QUERIES], kept[BLOCK_QUERIES];
    int counts[BLOCK_QUERIES], first = 0;
    const int is_single = tile->num_rows == 1, count = num_visible(a, tile->first_row + tile->num_rows - 1, chunk);
    if (!is_single && a->scales) pack_chunk(a, tile, kv_head, chunk, count, 1, &packed);
    else if (!is_single) pack_chunk(a, tile, kv_head, chunk, count, 0, &packed);
    while (num_visible(a, tile->first_row + first / group, chunk) == 0) first += group;
    for (; first < num_queries; first += BLOCK_QUERIES) {
        const int some = min_int(num_queries - first, BLOCK_QUERIES);
        for (int q = 0; q < some; q++) {
            const int row = (first + q) / group, index = (first + q) % group;
            const float *query = query_of(a, tile->first_row + row, kv_head * group + index);
            for (int i = 0; i < dim; i += 16)
                _mm256_store_si256((__m256i *)(pairs + (q * dim + i) / 2),
                                   (__m256i)_mm512_cvtneps_pbh(vf_mul(vf_load(query + i), scale)));
            counts[q] = num_visible(a, tile->first_row + row, chunk);
            kept[q] = partial_at(a, to, row * row_partials + index);
            found[q] = is_first ? kept[q] : partial_at(a, memory, q);
        }
        switch (some) {
            ATTEND(1)
            ATTEND(2)
            ATTEND(3)
            ATTEND(4)
            ATTEND(5)
            ATTEND(6)
        }
        for (int q = 0; q < some && !is_first; q++) merge(kept[q], found[q], dim);
    }
}

#else

#define MAX_GROUP 4

INLINE vf load_cached(const char *p, const int is_int8) {
    return is_int8 ? vf_load_int8((const int8_t *)p) : vf_load_bf16((const uint16_t *)p);
}

/* `group` queries of one row over one chunk. `is_int8` is a constant, `group` and `dim` are for the common shapes. A
   key's scale multiplies its score, a value's its weight. */
INLINE void attend_row(const Attention *a, int row, int kv_head, int chunk, const float *queries, const int group,
                       const int dim, const int is_int8, const Partial *to) {
    const int num_vectors = dim / VL, bytes = is_int8 ? 1 : 2, size = a->block_size;
    const int64_t head_bytes = (int64_t)dim * bytes, token_bytes = 2 * a->num_kv_heads * head_bytes;
    const int64_t start = (int64_t)chunk * CHUNK;
    const int count = num_visible(a, row, chunk), padded = (count + VL - 1) / VL * VL;
    const int32_t *table = table_of(a, row);
    const char *keys = a->cache + kv_head * head_bytes, *values = keys + token_bytes / 2;
    const vf scale = vf_set1(1.0f / sqrtf((float)dim));
    _Alignas(64) float scores[MAX_GROUP][CHUNK];
    vf sums[MAX_GROUP][MAX_HEAD_DIM / VL];
    /* A block's last slots may hold nothing yet: they are read, since cache memory is never unmapped, and masked. */
    for (int t0 = 0; t0 < count; t0 += VL) {
        const int64_t slot = slot_at(a, table, start + t0);
        const char *at = keys + slot * token_bytes;
        vf products[MAX_GROUP][VL];
        for (int t = 0; t < VL; t++, at += token_bytes) {
            /* Strides defeat the hardware's prefetcher; blocks mostly follow each other. */
            for (int i = 0; i < head_bytes; i += 64) _mm_prefetch(at + PREFETCH_TOKENS * token_bytes + i, _MM_HINT_T0);
            for (int g = 0; g < group; g++) products[g][t] = vf_set1(0.0f);
            for (int i = 0; i < num_vectors; i++) {
                vf key = load_cached(at + i * VL * bytes, is_int8);
                for (int g = 0; g < group; g++)
                    products[g][t] = vf_fma(key, vf_load(queries + g * dim + i * VL), products[g][t]);
            }
        }
        vf factor = scale;
        if (is_int8) factor = vf_mul(scale, vf_load_bf16(a->scales + scale_index(slot, kv_head, a->num_kv_heads, size)));
        for (int g = 0; g < group; g++) vf_store(scores[g] + t0, vf_mul(vf_sum_rows(products[g]), factor));
    }
    for (int g = 0; g < group; g++) {
        for (int t = count; t < padded; t++) scores[g][t] = -INFINITY;
        vf top = vf_load(scores[g]), sum = vf_set1(0.0f);
        for (int t = VL; t < padded; t += VL) top = vf_max(top, vf_load(scores[g] + t));
        *to[g].largest = vf_top(top);
        for (int t = 0; t < padded; t += VL) {
            vf weight = vf_exp(vf_sub(vf_load(scores[g] + t), vf_set1(*to[g].largest)));
            vf_store(scores[g] + t, weight);
            sum = vf_add(sum, weight);
        }
        *to[g].total = vf_sum(sum);
        for (int i = 0; i < num_vectors; i++) sums[g][i] = vf_set1(0.0f);
    }
    if (is_int8)
        for (int t = 0; t < padded; t += VL) {
            const int64_t slot = slot_at(a, table, start + t);
            const int head = a->num_kv_heads + kv_head;
            const vf factor = vf_load_bf16(a->scales + scale_index(slot, head, a->num_kv_heads, size));
            for (int g = 0; g < group; g++) vf_store(scores[g] + t, vf_mul(vf_load(scores[g] + t), factor));
        }
    for (int t0 = 0; t0 < count; t0 += size) {
        const char *at = values + slot_at(a, table, start + t0) * token_bytes;
        const int end = min_int(count - t0, size);
        for (int t = 0; t < end; t++, at += token_bytes) {
            for (int i = 0; i < head_bytes; i += 64) _mm_prefetch(at + PREFETCH_TOKENS * token_bytes + i, _MM_HINT_T0);
            for (int i = 0; i < num_vectors; i++) {
                vf value = load_cached(at + i * VL * bytes, is_int8);
                for (int g = 0; g < group; g++) sums[g][i] = vf_fma(vf_set1(scores[g][t0 + t]), value, sums[g][i]);
            }
        }
    }
    for (int g = 0; g < group; g++)
        for (int i = 0; i < num_vectors; i++) vf_store(to[g].sums + i * VL, sums[g][i]);
}

#define ATTEND(heads)                                                                               \
    case heads:                                                                                     \
        if (dim == 64) attend_row(a, row, kv_head, chunk, queries, heads, 64, is_int8, to);         \
        else if (dim == 128) attend_row(a, row, kv_head, chunk, queries, heads, 128, is_int8, to);  \
        else attend_row(a, row, kv_head, chunk, queries, heads, dim, is_int8, to);                  \
        break;

INLINE void attend_queries(const Attention *a, int row, int kv_head, int chunk, const float *queries, int count,
                           const int is_int8, const Partial *to) {
    const int dim = a->head_dim;
    switch (count) {
        ATTEND(1)
        ATTEND(2)
        ATTEND(3)
        ATTEND(4)
    }
}

/* The tile's rows over one chunk, of one key head. to: (rows, row_partials), the queries of the head first in a row;
   the first of a query's partials is stored there, those that follow are merged. */
static void attend_chunk(const Attention *a, const struct Tile *tile, int kv_head, int chunk, int is_first, float *to,
                         int row_partials) {
    const int group = group_of(a);
    float memory[MAX_GROUP * (2 + MAX_HEAD_DIM)];
    Partial found[MAX_GROUP], kept[MAX_GROUP];
    for (int r = 0; r < tile->num_rows; r++) {
        const int row = tile->first_row + r;
        if (num_visible(a, row, chunk) == 0) continue;
        for (int first = 0; first < group; first += MAX_GROUP) {
            const int some = min_int(group - first, MAX_GROUP);
            const float *queries = query_of(a, row, kv_head * group + first);
            for (int g = 0; g < some; g++) {
                kept[g] = partial_at(a, to, r * row_partials + first + g);
                found[g] = is_first ? kept[g] : partial_at(a, memory, g);
            }
            if (a->scales) attend_queries(a, row, kv_head, chunk, queries, some, 1, found);
            else attend_queries(a, row, kv_head, chunk, queries, some, 0, found);
            for (int g = 0; g < some && !is_first; g++) merge(kept[g], found[g], a->head_dim);
        }
    }
}

#endif

/* ---- Tiles ---- */

static void store_row(const Attention *a, int row, int head, Partial from) {
    float *out = a->out + ((int64_t)row * a->num_heads + head) * a->head_dim;
    const vf share = vf_set1(1.0f / *from.total);
    for (int i = 0; i < a->head_dim; i += VL) vf_store(out + i, vf_mul(vf_load(from.sums + i), share));
}

static void attend_head(const Attention *a, const struct Tile *tile, int kv_head) {
    const int group = group_of(a);
    float partials[tile->num_rows * group * partial_size(a)];
    /* A row's first chunk is the first one of all. */
    for (int chunk = 0; chunk < tile->num_chunks; chunk++)
        attend_chunk(a, tile, kv_head, chunk, chunk == 0, partials, group);
    for (int r = 0; r < tile->num_rows; r++)
        for (int g = 0; g < group; g++)
            store_row(a, tile->first_row + r, kv_head * group + g, partial_at(a, partials, r * group + g));
}

static void merge_chunks(const Attention *a, const struct Tile *tile) {
    for (int r = 0; r < tile->num_rows; r++)
        for (int head = 0; head < a->num_heads; head++) {
            const int64_t first = tile->first_partial + r * a->num_heads + head;
            const Partial whole = partial_at(a, a->partials, first);
            for (int chunk = 1; chunk < tile->num_chunks && num_visible(a, tile->first_row + r, chunk); chunk++) {
                const int64_t index = first + (int64_t)chunk * tile->num_rows * a->num_heads;
                merge(whole, partial_at(a, a->partials, index), a->head_dim);
            }
            store_row(a, tile->first_row + r, head, whole);
        }
}

/* Who finishes a tile's last chunk merges them all, in their order. */
static void attend_split(const Attention *a, struct Tile *tile, int chunk) {
    for (int kv_head = 0; kv_head < a->num_kv_heads; kv_head++) {
        const int64_t index = tile->first_partial + (int64_t)chunk * tile->num_rows * a->num_heads + kv_head * group_of(a);
        attend_chunk(a, tile, kv_head, chunk, 1, a->partials + index * partial_size(a), a->num_heads);
    }
    if (atomic_fetch_add(&tile->num_done, 1) + 1 < tile->num_chunks) return;
    atomic_store(&tile->num_done, 0);
    merge_chunks(a, tile);
}

static void attend_items(void *context, int first, int last) {
    const Attention *a = context;
    for (int i = first; i < last; i++) {
        struct Tile *tile = a->tiles + a->items[i].tile;
        if (tile->is_split) attend_split(a, tile, a->items[i].which);
        else attend_head(a, tile, a->items[i].which);
    }
}

void attend(const Attention *a) { run_parallel(attend_items, (void *)a, a->num_items, 1); }

INLINE int continues(const Attention *a, int row) {
    return a->sequences[row] == a->sequences[row - 1] && a->positions[row] == a->positions[row - 1] + 1;
}

static int plan_tiles(Attention *a) {
    const int most = TILE_QUERIES / group_of(a) > 0 ? TILE_QUERIES / group_of(a) : 1;
    int num_tiles = 0;
    for (int row = 0, next; row < a->num_rows; row = next) {
        for (next = row + 1; next < a->num_rows && next - row < most && continues(a, next);) next++;
        const int num_chunks = (int)(a->positions[next - 1] / CHUNK) + 1;
        a->tiles[num_tiles++] = (struct Tile){row, next - row, num_chunks, next - row <= SPLIT_ROWS, 0, 0};
    }
    return num_tiles;
}

void plan_attention(Attention *a) {
    a->tiles = scratch(SLOT_TILES, (int64_t)a->num_rows * sizeof(struct Tile));
    const int num_tiles = plan_tiles(a);
    int64_t num_items = 0, num_partials = 0;
    for (int i = 0; i < num_tiles; i++) {
        struct Tile *tile = a->tiles + i;
        tile->first_partial = num_partials;
        if (tile->is_split) num_partials += (int64_t)tile->num_chunks * tile->num_rows * a->num_heads;
        num_items += tile->is_split ? tile->num_chunks : a->num_kv_heads;
    }
    a->items = scratch(SLOT_ITEMS, num_items * sizeof(struct Item));
    a->partials = scratch(SLOT_PARTIALS, num_partials * partial_size(a) * sizeof(float));
    a->num_items = 0;
    /* Late tiles of a prompt have the longest contexts: begun first, they leave no thread waiting at the end. */
    for (int i = num_tiles - 1; i >= 0; i--)
        for (int which = 0; which < (a->tiles[i].is_split ? a->tiles[i].num_chunks : a->num_kv_heads); which++)
            a->items[a->num_items++] = (struct Item){i, which};
}

/* ---- Whole texts, without a cache between calls ---- */

/* queries, out: (texts, length, heads, head_dim). cache: (texts, slots, keys then values, kv heads, head_dim) bf16, with
   at least `length` slots to a text, a multiple of TEXT_BLOCK; those behind `length` are read, but count for nothing. */
void causerie_attend_texts(const uint16_t *cache, const float *queries, float *out, int texts, int length, int slots,
                           int num_heads, int num_kv_heads, int head_dim, int threads) {
    enter(threads);
    const int rows = texts * length, blocks = slots / TEXT_BLOCK;
    int64_t *positions = scratch(SLOT_POSITIONS, (int64_t)rows * sizeof *positions);
    int32_t *sequences = scratch(SLOT_SEQUENCES, (int64_t)rows * sizeof *sequences);
    int32_t *tables = scratch(SLOT_TABLES, (int64_t)texts * blocks * sizeof *tables);
    for (int row = 0; row < rows; row++) {
        positions[row] = row % length;
        sequences[row] = row / length;
    }
    for (int i = 0; i < texts * blocks; i++) tables[i] = i;
    Attention a = {.cache = (const char *)cache, .queries = queries, .out = out, .positions = positions, .tables = tables};
    a.sequences = sequences;
    a.num_rows = rows;
    a.table_width = blocks;
    a.query_stride = num_heads * head_dim;
    a.num_heads = num_heads;
    a.num_kv_heads = num_kv_heads;
    a.head_dim = head_dim;
    a.block_size = TEXT_BLOCK;
    plan_attention(&a);
    attend(&a);
    leave();
}
