/* Grouped-query attention of a step's rows over the paged cache.

   A row's result is computed by the same operations in the same order whatever other rows, threads or tiles there are.
   Keys and values are read as bf16 or int8; on a processor with products of bf16 pairs, queries and weights are rounded
   to bf16 as well, elsewhere they are fp32. serving/engine/runner.py is the twin. */
#ifndef CAUSERIE_ATTENTION_H
#define CAUSERIE_ATTENTION_H

#include <stdint.h>

typedef struct {
    const char *cache;           /* of one layer: (slots, keys then values, kv heads, head_dim) bf16, or int8 codes */
    const uint16_t *scales;      /* of int8 codes: (blocks, keys then values, kv heads, block_size) bf16; or null */
    const float *queries;        /* (rows, query_stride), a row's heads first */
    float *out;                  /* (rows, heads * head_dim) */
    const int64_t *positions;    /* (rows) */
    const int32_t *tables;       /* (sequences, table_width): blocks of each sequence */
    const int32_t *sequences;    /* (rows): which table is the row's */
    int32_t num_rows, table_width, query_stride, num_heads, num_kv_heads, head_dim, block_size;
    struct Tile *tiles;          /* what `plan_attention` sets */
    struct Item *items;
    float *partials;
    int32_t num_items;
} Attention;

#define MAX_HEAD_DIM 256

/* Shares out the rows, once for all layers of a step. Only between `enter` and `leave`, as `attend` is. */
void plan_attention(Attention *attention);

/* Every row attends to the positions of its sequence up to its own. */
void attend(const Attention *attention);

/* Where the scale of `slot` is; those of its neighbours in the block follow. Heads of values come after all of keys. */
static inline int64_t scale_index(int64_t slot, int head, int num_kv_heads, int block_size) {
    return (slot / block_size * 2 * num_kv_heads + head) * block_size + slot % block_size;
}

#endif
