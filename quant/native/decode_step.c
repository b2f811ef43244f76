/* One forward pass of a Llama-like decoder over a few rows: RMS norms, rotary halves, grouped queries over the paged
   cache, SwiGLU. Rows may be of different sequences or neighbours in one; every row attends to its own positions only.
   serving/engine/native_step.py mirrors the structs; serving/engine/runner.py is the twin. */
#include <float.h>
#include <math.h>
#include <stddef.h>

#include "attention.h"
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
    float *hidden;               /* (rows, hidden): the residual stream, in place of embeddings; or null */
    uint16_t *out;               /* (rows, hidden) bf16: hidden states after the final norm; or null: see `hidden` */
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
    Attention attention;
} Step;

enum { SLOT_CODES, SLOT_SCALES, SLOT_SUMS, SLOT_HIDDEN, SLOT_COS, SLOT_SIN, SLOT_WIDE, SLOT_ATTENDED };

/* Rows of one run below which sharing small work costs more than it saves. */
#define ROW_GRAIN 4

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

INLINE uint16_t *scale_of(const Step *s, int64_t slot, int head) {
    return s->scales + scale_index(slot, head, s->model->num_kv_heads, s->model->block_size);
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

/* ---- The step ---- */

static void embed_and_turn(Step *s) {
    const Model *m = s->model;
    const int half = m->head_dim / 2;
    for (int row = 0; row < s->batch->num_rows; row++) {
        const uint16_t *from = m->embedding + s->batch->ids[row] * m->hidden;
        if (!s->batch->hidden)
            for (int i = 0; i < m->hidden; i += VL)
                vf_store(s->hidden + (int64_t)row * m->hidden + i, vf_load_bf16(from + i));
        for (int i = 0; i < half; i++) {
            float angle = (float)s->batch->positions[row] * m->frequencies[i];
            s->cos[(int64_t)row * half + i] = cosf(angle);
            s->sin[(int64_t)row * half + i] = sinf(angle);
        }
    }
}

static Attention begin_attention(const Step *s) {
    const Model *m = s->model;
    const Batch *batch = s->batch;
    Attention attention = {
        .queries = s->wide,
        .out = s->attended,
        .positions = batch->positions,
        .tables = batch->tables,
        .sequences = batch->sequences,
        .num_rows = batch->num_rows,
        .table_width = batch->table_width,
        .num_heads = m->num_heads,
        .num_kv_heads = m->num_kv_heads,
        .head_dim = m->head_dim,
        .block_size = m->block_size,
    };
    plan_attention(&attention);
    return attention;
}

static void attend_layer(Step *s) {
    s->attention.cache = s->cache;
    s->attention.scales = s->scales;
    s->attention.query_stride = s->layer->qkv.out;
    attend(&s->attention);
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
    attend_layer(s);
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
        .hidden = batch->hidden ? batch->hidden : scratch(SLOT_HIDDEN, rows * m->hidden * 4),
        .cos = scratch(SLOT_COS, rows * half * 4),
        .sin = scratch(SLOT_SIN, rows * half * 4),
        .wide = scratch(SLOT_WIDE, rows * (m->inner > qkv_width ? m->inner : qkv_width) * 4),
        .attended = scratch(SLOT_ATTENDED, rows * query_width * 4),
    };
    s.x.codes = scratch(SLOT_CODES, rows * widest);
    s.x.scales = scratch(SLOT_SCALES, rows * widest / 32 * 4);
    s.x.minus_sums = scratch(SLOT_SUMS, rows * widest / 32 * 4);
    s.attention = begin_attention(&s);
    embed_and_turn(&s);
    for (int index = 0; index < m->num_layers; index++) {
        s.layer = m->layers + index;
        s.cache = (char *)batch->cache + index * batch->layer_stride * cached_bytes(batch->scales != NULL);
        s.scales = batch->scales ? batch->scales + index * batch->scales_layer_stride : NULL;
        run_layer(&s);
    }
    float normed[m->hidden];
    for (int64_t row = 0; batch->out && row < rows; row++) {
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
