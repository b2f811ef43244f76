/* One forward pass of a Llama-like decoder over a few rows: RMS norms, rotary halves, grouped queries over the paged
   cache, SwiGLU. Rows may be of different sequences or neighbours in one; every row attends to its own positions only.
   serving/engine/native_step.py mirrors the structs; serving/engine/runner.py is the twin. */
#include <float.h>
#include <math.h>
#include <stddef.h>

#include "kernels.h"
#include "vectors.h"

typedef struct {
    const float *input_norm, *post_attention_norm; /* (hidden) */
    const float *q_norm, *k_norm;                  /* (head_dim), or null */
    Matrix qkv, out, gate_up, down;
} Layer;

typedef struct {
    const Layer *layers;
    const uint16_t *embedding;   /* (vocabulary, hidden) bf16 */
    const float *final_norm;     /* (hidden) */
    const float *frequencies;    /* (head_dim / 2) radians per position */
    int32_t num_layers, hidden, inner, num_heads, num_kv_heads, head_dim, block_size;
    float norm_eps;
} Model;

typedef struct {
    void *cache;                 /* (layers, slots, keys then values, kv heads, head_dim) bf16, or int8 codes */
    uint16_t *scales;            /* of int8 codes: (layers, blocks, keys then values, kv heads, block_size) bf16; or null */
    int64_t layer_stride, scales_layer_stride; /* elements */
    const int64_t *ids, *positions;
    const int32_t *tables;       /* (sequences, table_width): blocks of each sequence */
    const int32_t *sequences;    /* (rows): which table is the row's */
    int32_t num_rows, table_width;
    uint16_t *out;               /* (rows, hidden) bf16: hidden states after the final norm */
} Batch;

typedef struct {
    const Model *model;
    const Batch *batch;
    const Layer *layer;
    char *cache;                 /* of this layer */
    uint16_t *scales;
    float *hidden;               /* (rows, hidden): the residual stream */
    float *cos, *sin;            /* (rows, head_dim / 2) */
    float *wide;                 /* (rows, widest): q, k and v; attended; activated */
    float *attended;             /* (rows, heads * head_dim) */
    const float *norm;
    Activations x;
} Step;

enum { SLOT_CODES, SLOT_SCALES, SLOT_SUMS, SLOT_HIDDEN, SLOT_COS, SLOT_SIN, SLOT_WIDE, SLOT_ATTENDED };

/* Rows of one run below which sharing small work costs more than it saves. */
#define ROW_GRAIN 4
/* Keys scored at once: their scores stay in the first cache. */
#define CONTEXT_CHUNK 256
#define PREFETCH_TOKENS 32
#define MAX_GROUP 4
#define MAX_HEAD_DIM 256

/* ---- Norms and activations ---- */

/* y = x / sqrt(mean(x^2) + eps) * weight; y may be x. */
INLINE void rms_norm(const float *x, const float *weight, float eps, int width, float *y) {
    vf sum = vf_set1(0.0f);
    for (int i = 0; i < width; i += VL) sum = vf_fma(vf_load(x + i), vf_load(x + i), sum);
    vf inverse = vf_set1(1.0f / sqrtf(vf_sum(sum) / (float)width + eps));
    for (int i = 0; i < width; i += VL) vf_store(y + i, vf_mul(vf_mul(vf_load(x + i), inverse), vf_load(weight + i)));
}

static void set_activations(Step *s, const Matrix *m) {
    s->x.in = m->in;
    s->x.groups = m->in / m->group;
}

static void norm_rows(void *context, int first, int last) {
    Step *s = context;
    const int width = s->model->hidden;
    const int group = s->x.in / s->x.groups;
    float normed[width];
    for (int row = first; row < last; row++) {
        rms_norm(s->hidden + (int64_t)row * width, s->norm, s->model->norm_eps, width, normed);
        quantize_row(normed, group, &s->x, row);
    }
}

static void quantize_attended(void *context, int first, int last) {
    Step *s = context;
    for (int row = first; row < last; row++)
        quantize_row(s->attended + (int64_t)row * s->x.in, s->x.in / s->x.groups, &s->x, row);
}

static void quantize_activated(void *context, int first, int last) {
    Step *s = context;
    for (int row = first; row < last; row++)
        quantize_row(s->wide + (int64_t)row * s->x.in, s->x.in / s->x.groups, &s->x, row);
}

/* ---- Products with what follows them ---- */

INLINE vf with_bias(const Matrix *m, int column, vf y) { return m->bias ? vf_add(y, vf_load(m->bias + column)) : y; }

static void store_qkv(void *context, int block, int first_row, int rows, const float *outputs) {
    Step *s = context;
    const Matrix *m = &s->layer->qkv;
    for (int r = 0; r < rows; r++)
        for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL)
            vf_store(s->wide + (int64_t)(first_row + r) * m->out + column,
                     with_bias(m, column, vf_load(outputs + r * BLOCK_OUTPUTS + i)));
}

static void add_to_hidden(Step *s, const Matrix *m, int block, int first_row, int rows, const float *outputs) {
    for (int r = 0; r < rows; r++)
        for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL) {
            float *to = s->hidden + (int64_t)(first_row + r) * m->out + column;
            vf_store(to, vf_add(vf_load(to), with_bias(m, column, vf_load(outputs + r * BLOCK_OUTPUTS + i))));
        }
}

static void store_attention_output(void *context, int block, int first_row, int rows, const float *outputs) {
    Step *s = context;
    add_to_hidden(s, &s->layer->out, block, first_row, rows, outputs);
}

static void store_feed_forward(void *context, int block, int first_row, int rows, const float *outputs) {
    Step *s = context;
    add_to_hidden(s, &s->layer->down, block, first_row, rows, outputs);
}

static void project_qkv(void *context, int first, int last) {
    Step *s = context;
    for_each_block(&s->layer->qkv, first, last, &s->x, s->batch->num_rows, store_qkv, s);
}

static void add_attention_output(void *context, int first, int last) {
    Step *s = context;
    for_each_block(&s->layer->out, first, last, &s->x, s->batch->num_rows, store_attention_output, s);
}

static void add_feed_forward(void *context, int first, int last) {
    Step *s = context;
    for_each_block(&s->layer->down, first, last, &s->x, s->batch->num_rows, store_feed_forward, s);
}

/* Item `block` is 16 gates and the 16 inputs they open. */
static void project_and_gate(void *context, int first, int last) {
    Step *s = context;
    const Matrix *m = &s->layer->gate_up;
    const int inner = s->model->inner;
    float gate[MAX_TILE_ROWS * BLOCK_OUTPUTS], up[MAX_TILE_ROWS * BLOCK_OUTPUTS];
    float *const both[2] = {gate, up};
    for (int block = first; block < last; block++)
        for (int row = 0; row < s->batch->num_rows; row += MAX_TILE_ROWS) {
            int rows = s->batch->num_rows - row < MAX_TILE_ROWS ? s->batch->num_rows - row : MAX_TILE_ROWS;
            multiply_two_blocks(m, (const int[]){block, block + inner / BLOCK_OUTPUTS}, &s->x, row, rows, both);
            for (int r = 0; r < rows; r++)
                for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL) {
                    vf g = with_bias(m, column, vf_load(gate + r * BLOCK_OUTPUTS + i));
                    vf u = with_bias(m, inner + column, vf_load(up + r * BLOCK_OUTPUTS + i));
                    vf open = vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_set1(0.0f), g)));
                    vf_store(s->wide + (int64_t)(row + r) * inner + column, vf_mul(vf_div(g, open), u));
                }
        }
}

/* ---- Attention ---- */

static void rotate(float *head, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i += VL) {
        vf a = vf_load(head + i), b = vf_load(head + half + i), c = vf_load(cos + i), s = vf_load(sin + i);
        vf_store(head + i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(head + half + i, vf_fma(b, c, vf_mul(a, s)));
    }
}

INLINE int64_t slot_of(const Step *s, int row, int64_t position) {
    const int size = s->model->block_size;
    const int32_t *table = s->batch->tables + (int64_t)s->batch->sequences[row] * s->batch->table_width;
    return (int64_t)table[position / size] * size + position % size;
}

INLINE int cached_bytes(const int is_int8) { return is_int8 ? 1 : 2; }

INLINE vf load_cached(const char *p, const int is_int8) {
    return is_int8 ? vf_load_int8((const int8_t *)p) : vf_load_bf16((const uint16_t *)p);
}

/* Where the scale of `slot` is; those of its neighbours in the block follow. Heads of values come after all of keys. */
INLINE uint16_t *scale_of(const Step *s, int64_t slot, int head) {
    const int size = s->model->block_size;
    return s->scales + (slot / size * 2 * s->model->num_kv_heads + head) * size + slot % size;
}

/* Codes of one head of keys or values, rounded by the scale that is stored; returns it. Twin: int8_rows.py. */
INLINE uint16_t quantize_head(const float *x, int dim, int8_t *codes) {
    vf top = vf_abs(vf_load(x));
    for (int i = VL; i < dim; i += VL) top = vf_max(top, vf_abs(vf_load(x + i)));
    const uint16_t scale = bf16_of(vf_top(top) / 127.0f);
    const float step = bf16_value(scale);
    const vf inverse = vf_set1(step >= FLT_MIN ? 1.0f / step : 0.0f);
    for (int i = 0; i < dim; i += VL) vf_store_int8(codes + i, vf_mul(vf_load(x + i), inverse));
    return scale;
}

/* keys_values: (keys then values, kv heads, head_dim) of one token. */
static void cache_token(const Step *s, int64_t slot, const float *keys_values) {
    const int dim = s->model->head_dim, heads = 2 * s->model->num_kv_heads;
    char *to = s->cache + slot * heads * dim * cached_bytes(s->scales != NULL);
    if (s->scales) {
        for (int head = 0; head < heads; head++)
            *scale_of(s, slot, head) = quantize_head(keys_values + head * dim, dim, (int8_t *)to + head * dim);
    } else {
        for (int i = 0; i < heads * dim; i += VL) vf_store_bf16((uint16_t *)to + i, vf_load(keys_values + i));
    }
}

/* Queries and keys are normed and turned in place; keys and values go to the cache. */
static void store_rows(void *context, int first, int last) {
    Step *s = context;
    const Model *m = s->model;
    const int dim = m->head_dim, half = dim / 2;
    const int num_turned = m->num_heads + m->num_kv_heads;
    for (int row = first; row < last; row++) {
        float *heads = s->wide + (int64_t)row * s->layer->qkv.out;
        for (int head = 0; head < num_turned; head++) {
            const float *norm = head < m->num_heads ? s->layer->q_norm : s->layer->k_norm;
            if (norm) rms_norm(heads + head * dim, norm, m->norm_eps, dim, heads + head * dim);
            rotate(heads + head * dim, s->cos + (int64_t)row * half, s->sin + (int64_t)row * half, half);
        }
        cache_token(s, slot_of(s, row, s->batch->positions[row]), heads + m->num_heads * dim);
    }
}

/* Attention of `group` query heads of one row over one key head. queries and out: (group, dim). `is_int8` is a
   constant, `group` and `dim` are for the common shapes. A key's scale multiplies its score, a value's its weight.
   Softmax is accumulated over chunks of the context: arXiv:2205.14135, section 3.1. */
INLINE void attend(const Step *s, int row, int kv_head, const float *queries, const int group, const int dim,
                   const int is_int8, float *out) {
    const Model *m = s->model;
    const int size = m->block_size, num_vectors = dim / VL, vector_bytes = VL * cached_bytes(is_int8);
    const int64_t head_bytes = (int64_t)dim * cached_bytes(is_int8), token_bytes = 2 * m->num_kv_heads * head_bytes;
    const int64_t context = s->batch->positions[row] + 1;
    const int32_t *table = s->batch->tables + (int64_t)s->batch->sequences[row] * s->batch->table_width;
    const char *keys = s->cache + kv_head * head_bytes, *values = keys + token_bytes / 2;
    const vf scale = vf_set1(1.0f / sqrtf((float)dim));
    _Alignas(64) float scores[MAX_GROUP][CONTEXT_CHUNK];
    float largest[MAX_GROUP], total[MAX_GROUP];
    vf sums[MAX_GROUP][MAX_HEAD_DIM / VL];
    for (int g = 0; g < group; g++) {
        largest[g] = -INFINITY;
        total[g] = 0.0f;
        for (int i = 0; i < num_vectors; i++) sums[g][i] = vf_set1(0.0f);
    }
    for (int64_t start = 0; start < context; start += CONTEXT_CHUNK) {
        const int count = context - start < CONTEXT_CHUNK ? (int)(context - start) : CONTEXT_CHUNK;
        /* A block's last slots may hold nothing yet: they are read, since cache memory is never unmapped, and masked. */
        for (int t0 = 0; t0 < count; t0 += VL) {
            const int64_t position = start + t0, slot = (int64_t)table[position / size] * size + position % size;
            const char *at = keys + slot * token_bytes;
            vf products[MAX_GROUP][VL];
            for (int t = 0; t < VL; t++, at += token_bytes) {
                /* Strides defeat the hardware's prefetcher; blocks mostly follow each other. */
                for (int i = 0; i < head_bytes; i += 64) _mm_prefetch(at + PREFETCH_TOKENS * token_bytes + i, _MM_HINT_T0);
                for (int g = 0; g < group; g++) products[g][t] = vf_set1(0.0f);
                for (int i = 0; i < num_vectors; i++) {
                    vf key = load_cached(at + i * vector_bytes, is_int8);
                    for (int g = 0; g < group; g++)
                        products[g][t] = vf_fma(key, vf_load(queries + g * dim + i * VL), products[g][t]);
                }
            }
            const vf factor = is_int8 ? vf_mul(scale, vf_load_bf16(scale_of(s, slot, kv_head))) : scale;
            for (int g = 0; g < group; g++) vf_store(scores[g] + t0, vf_mul(vf_sum_rows(products[g]), factor));
        }
        const int padded = (count + VL - 1) / VL * VL;
        for (int g = 0; g < group; g++) {
            for (int t = count; t < padded; t++) scores[g][t] = -INFINITY;
            vf top = vf_load(scores[g]);
            for (int t = VL; t < padded; t += VL) top = vf_max(top, vf_load(scores[g] + t));
            float now = vf_top(top);
            if (now > largest[g]) {
                vf shrink = vf_exp(vf_set1(largest[g] - now));
                if (start == 0) shrink = vf_set1(0.0f);
                float old[VL];
                vf_store(old, shrink);
                total[g] *= old[0];
                for (int i = 0; i < num_vectors; i++) sums[g][i] = vf_mul(sums[g][i], shrink);
                largest[g] = now;
            }
            vf sum = vf_set1(0.0f);
            for (int t = 0; t < padded; t += VL) {
                vf weight = vf_exp(vf_sub(vf_load(scores[g] + t), vf_set1(largest[g])));
                vf_store(scores[g] + t, weight);
                sum = vf_add(sum, weight);
            }
            total[g] += vf_sum(sum);
        }
        if (is_int8)
            for (int t = 0; t < padded; t += VL) {
                const int64_t position = start + t, slot = (int64_t)table[position / size] * size + position % size;
                const vf factor = vf_load_bf16(scale_of(s, slot, m->num_kv_heads + kv_head));
                for (int g = 0; g < group; g++) vf_store(scores[g] + t, vf_mul(vf_load(scores[g] + t), factor));
            }
        for (int t0 = 0; t0 < count; t0 += size) {
            const char *at = values + (int64_t)table[(start + t0) / size] * size * token_bytes;
            const int end = count - t0 < size ? count - t0 : size;
            for (int t = 0; t < end; t++, at += token_bytes) {
                for (int i = 0; i < head_bytes; i += 64) _mm_prefetch(at + PREFETCH_TOKENS * token_bytes + i, _MM_HINT_T0);
                for (int i = 0; i < num_vectors; i++) {
                    vf value = load_cached(at + i * vector_bytes, is_int8);
                    for (int g = 0; g < group; g++) sums[g][i] = vf_fma(vf_set1(scores[g][t0 + t]), value, sums[g][i]);
                }
            }
        }
    }
    for (int g = 0; g < group; g++)
        for (int i = 0; i < num_vectors; i++)
            vf_store(out + g * dim + i * VL, vf_mul(sums[g][i], vf_set1(1.0f / total[g])));
}

#define ATTEND(heads)                                                                        \
    case heads:                                                                              \
        if (dim == 64) attend(s, row, kv_head, queries, heads, 64, is_int8, out);            \
        else if (dim == 128) attend(s, row, kv_head, queries, heads, 128, is_int8, out);     \
        else attend(s, row, kv_head, queries, heads, dim, is_int8, out);                     \
        break;

/* Item `row * kv heads + kv head`. */
INLINE void attend_items(const Step *s, int first, int last, const int is_int8) {
    const Model *m = s->model;
    const int dim = m->head_dim, group = m->num_heads / m->num_kv_heads;
    for (int item = first; item < last; item++) {
        const int row = item / m->num_kv_heads, kv_head = item % m->num_kv_heads;
        for (int g = 0; g < group; g += MAX_GROUP) {
            const int head = kv_head * group + g;
            const float *queries = s->wide + (int64_t)row * s->layer->qkv.out + head * dim;
            float *out = s->attended + ((int64_t)row * m->num_heads + head) * dim;
            switch (group - g < MAX_GROUP ? group - g : MAX_GROUP) {
                ATTEND(1)
                ATTEND(2)
                ATTEND(3)
                ATTEND(4)
            }
        }
    }
}

static void attend_heads(void *context, int first, int last) {
    Step *s = context;
    if (s->scales) attend_items(s, first, last, 1);
    else attend_items(s, first, last, 0);
}

/* ---- The step ---- */

static void embed_and_turn(Step *s) {
    const Model *m = s->model;
    const int half = m->head_dim / 2;
    for (int row = 0; row < s->batch->num_rows; row++) {
        const uint16_t *from = m->embedding + s->batch->ids[row] * m->hidden;
        for (int i = 0; i < m->hidden; i += VL) vf_store(s->hidden + (int64_t)row * m->hidden + i, vf_load_bf16(from + i));
        for (int i = 0; i < half; i++) {
            float angle = (float)s->batch->positions[row] * m->frequencies[i];
            s->cos[(int64_t)row * half + i] = cosf(angle);
            s->sin[(int64_t)row * half + i] = sinf(angle);
        }
    }
}

static void run_layer(Step *s) {
    const Model *m = s->model;
    const Layer *layer = s->layer;
    const int rows = s->batch->num_rows;

    s->norm = layer->input_norm;
    set_activations(s, &layer->qkv);
    run_parallel(norm_rows, s, rows, ROW_GRAIN);
    run_parallel(project_qkv, s, layer->qkv.out / BLOCK_OUTPUTS, 2);
    run_parallel(store_rows, s, rows, ROW_GRAIN);
    run_parallel(attend_heads, s, rows * m->num_kv_heads, 1);
    set_activations(s, &layer->out);
    run_parallel(quantize_attended, s, rows, ROW_GRAIN);
    run_parallel(add_attention_output, s, m->hidden / BLOCK_OUTPUTS, 2);

    s->norm = layer->post_attention_norm;
    set_activations(s, &layer->gate_up);
    run_parallel(norm_rows, s, rows, ROW_GRAIN);
    run_parallel(project_and_gate, s, m->inner / BLOCK_OUTPUTS, 2);
    set_activations(s, &layer->down);
    run_parallel(quantize_activated, s, rows, ROW_GRAIN);
    run_parallel(add_feed_forward, s, m->hidden / BLOCK_OUTPUTS, 1);
}

void causerie_decode_step(const Model *m, const Batch *batch, int threads) {
    enter(threads);
    const int64_t rows = batch->num_rows, half = m->head_dim / 2, query_width = m->num_heads * m->head_dim;
    int64_t widest = m->inner > query_width ? m->inner : query_width;
    int64_t qkv_width = query_width + 2 * m->num_kv_heads * m->head_dim;
    if (m->hidden > widest) widest = m->hidden;
    Step s = {
        .model = m,
        .batch = batch,
        .hidden = scratch(SLOT_HIDDEN, rows * m->hidden * 4),
        .cos = scratch(SLOT_COS, rows * half * 4),
        .sin = scratch(SLOT_SIN, rows * half * 4),
        .wide = scratch(SLOT_WIDE, rows * (m->inner > qkv_width ? m->inner : qkv_width) * 4),
        .attended = scratch(SLOT_ATTENDED, rows * query_width * 4),
    };
    s.x.codes = scratch(SLOT_CODES, rows * widest);
    s.x.scales = scratch(SLOT_SCALES, rows * widest / 32 * 4);
    s.x.minus_sums = scratch(SLOT_SUMS, rows * widest / 32 * 4);
    embed_and_turn(&s);
    for (int index = 0; index < m->num_layers; index++) {
        s.layer = m->layers + index;
        s.cache = (char *)batch->cache + index * batch->layer_stride * cached_bytes(batch->scales != NULL);
        s.scales = batch->scales ? batch->scales + index * batch->scales_layer_stride : NULL;
        run_layer(&s);
    }
    float normed[m->hidden];
    for (int64_t row = 0; row < rows; row++) {
        rms_norm(s.hidden + row * m->hidden, m->final_norm, m->norm_eps, m->hidden, normed);
        for (int i = 0; i < m->hidden; i += VL) vf_store_bf16(batch->out + row * m->hidden + i, vf_load(normed + i));
    }
    leave();
}

/* Sizes by which the mirrors in Python are checked. */
int64_t causerie_struct_size(int which) {
    const int64_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Batch)};
    return sizes[which];
}
