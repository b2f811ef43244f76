/* The layers of a BERT-like encoder over one or several texts: queries, keys and values of a text attend to each other,
   post-layer norms, tanh-GELU. moderation/native_encoder.py mirrors the structs; moderation/encoder.py is the twin. */
#include <math.h>

#include "kernels.h"
#include "vectors.h"

typedef struct {
    Matrix qkv, out, up, down;
    const float *attention_weight, *attention_bias; /* (hidden): the norm behind attention */
    const float *output_weight, *output_bias;       /* (hidden): the norm behind the feed-forward part */
} EncoderLayer;

typedef struct {
    const EncoderLayer *layers;
    int32_t num_layers, hidden, inner, num_heads;
    float eps;
} EncoderModel;

typedef struct {
    const EncoderModel *model;
    const EncoderLayer *layer;
    const int32_t *ends;      /* (texts): where each text's tokens end */
    int32_t num_tokens;
    float *states;            /* (tokens, hidden): the residual stream */
    float *wide;              /* (tokens, 3 * hidden or inner) */
    float *mixed;             /* (tokens, hidden) */
    const float *source;      /* what is quantised next */
    const float *weight, *bias;
    Activations x;
} Pass;

enum { SLOT_CODES, SLOT_SCALES, SLOT_SUMS, SLOT_WIDE, SLOT_MIXED };

#define ROW_GRAIN 8
#define MAX_TEXT_TOKENS 128
#define MAX_HEAD_DIM 64
#define MAX_VECTORS (MAX_TEXT_TOKENS / VL)

/* ---- Products with what follows them ---- */

static void quantize_source(void *context, int first, int last) {
    Pass *p = context;
    for (int row = first; row < last; row++)
        quantize_row(p->source + (int64_t)row * p->x.in, p->x.in / p->x.groups, &p->x, row);
}

static void quantize(Pass *p, const Matrix *m, const float *source, int rows) {
    p->source = source;
    p->x.in = m->in;
    p->x.groups = m->in / m->group;
    run_parallel(quantize_source, p, rows, ROW_GRAIN);
}

INLINE vf output_of(const Matrix *m, int column, const float *outputs) {
    return vf_add(vf_load(outputs), vf_load(m->bias + column));
}

static void store_qkv(void *context, int block, int first_row, int rows, const float *outputs) {
    Pass *p = context;
    const Matrix *m = &p->layer->qkv;
    for (int r = 0; r < rows; r++)
        for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL)
            vf_store(p->wide + (int64_t)(first_row + r) * m->out + column,
                     output_of(m, column, outputs + r * BLOCK_OUTPUTS + i));
}

INLINE void add_to_states(Pass *p, const Matrix *m, int block, int first_row, int rows, const float *outputs) {
    for (int r = 0; r < rows; r++)
        for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL) {
            float *to = p->states + (int64_t)(first_row + r) * m->out + column;
            vf_store(to, vf_add(vf_load(to), output_of(m, column, outputs + r * BLOCK_OUTPUTS + i)));
        }
}

static void store_attention_output(void *context, int block, int first_row, int rows, const float *outputs) {
    Pass *p = context;
    add_to_states(p, &p->layer->out, block, first_row, rows, outputs);
}

static void store_down(void *context, int block, int first_row, int rows, const float *outputs) {
    Pass *p = context;
    add_to_states(p, &p->layer->down, block, first_row, rows, outputs);
}

/* 0.5 x (1 + tanh(y)) = x / (1 + e^(-2y)), with y = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vf gelu(vf x) {
    vf cube = vf_mul(vf_mul(x, x), x);
    vf twice = vf_mul(vf_set1(-2.0f * 0.7978845608028654f), vf_fma(vf_set1(0.044715f), cube, x));
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(twice)));
}

static void store_activated(void *context, int block, int first_row, int rows, const float *outputs) {
    Pass *p = context;
    const Matrix *m = &p->layer->up;
    for (int r = 0; r < rows; r++)
        for (int i = 0, column = block * BLOCK_OUTPUTS; i < BLOCK_OUTPUTS; i += VL, column += VL)
            vf_store(p->wide + (int64_t)(first_row + r) * m->out + column,
                     gelu(output_of(m, column, outputs + r * BLOCK_OUTPUTS + i)));
}

static void multiply_qkv(void *context, int first, int last) {
    Pass *p = context;
    for_each_block(&p->layer->qkv, first, last, &p->x, p->num_tokens, store_qkv, p);
}

static void multiply_out(void *context, int first, int last) {
    Pass *p = context;
    for_each_block(&p->layer->out, first, last, &p->x, p->num_tokens, store_attention_output, p);
}

static void multiply_up(void *context, int first, int last) {
    Pass *p = context;
    for_each_block(&p->layer->up, first, last, &p->x, p->num_tokens, store_activated, p);
}

static void multiply_down(void *context, int first, int last) {
    Pass *p = context;
    for_each_block(&p->layer->down, first, last, &p->x, p->num_tokens, store_down, p);
}

/* ---- Attention ---- */

typedef struct {
    _Alignas(64) float keys[MAX_HEAD_DIM][MAX_TEXT_TOKENS]; /* transposed; 0 behind the last token */
    _Alignas(64) float weights[MAX_TEXT_TOKENS];
} HeadRoom;

/* weights[t] = e^(scale * query . key t - the largest of these), 0 behind the last token; returns their sum. */
INLINE float attention_weights(const float *query, HeadRoom *room, int tokens, int head_dim, float scale) {
    const int vectors = (tokens + VL - 1) / VL;
    vf scores[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) scores[v] = vf_set1(0.0f);
    for (int d = 0; d < head_dim; d++) {
        vf q = vf_set1(query[d] * scale);
        for (int v = 0; v < vectors; v++) scores[v] = vf_fma(q, vf_load(room->keys[d] + v * VL), scores[v]);
    }
    for (int v = 0; v < vectors; v++) vf_store(room->weights + v * VL, scores[v]);
    for (int t = tokens; t < vectors * VL; t++) room->weights[t] = -INFINITY;
    vf top = vf_load(room->weights);
    for (int v = 1; v < vectors; v++) top = vf_max(top, vf_load(room->weights + v * VL));
    const vf largest = vf_set1(vf_top(top));
    vf sum = vf_set1(0.0f);
    for (int v = 0; v < vectors; v++) {
        vf weight = vf_exp(vf_sub(vf_load(room->weights + v * VL), largest)); /* e^-87 behind the last token */
        vf_store(room->weights + v * VL, weight);
        sum = vf_add(sum, weight);
    }
    return vf_sum(sum);
}

/* One head of one text. */
static void attend_head(Pass *p, int first, int tokens, int head) {
    const int hidden = p->model->hidden, head_dim = hidden / p->model->num_heads;
    const int64_t stride = 3 * (int64_t)hidden;
    const float *queries = p->wide + first * stride + head * head_dim;
    const float *keys = queries + hidden, *values = keys + hidden;
    const float scale = 1.0f / sqrtf((float)head_dim);
    HeadRoom room;
    for (int d = 0; d < head_dim; d++) {
        for (int t = 0; t < tokens; t++) room.keys[d][t] = keys[t * stride + d];
        for (int t = tokens; t < (tokens + VL - 1) / VL * VL; t++) room.keys[d][t] = 0.0f;
    }
    for (int row = 0; row < tokens; row++) {
        const vf inverse = vf_set1(1.0f / attention_weights(queries + row * stride, &room, tokens, head_dim, scale));
        vf sums[MAX_HEAD_DIM / VL];
        for (int v = 0; v < head_dim / VL; v++) sums[v] = vf_set1(0.0f);
        for (int t = 0; t < tokens; t++) {
            const vf weight = vf_set1(room.weights[t]);
            for (int v = 0; v < head_dim / VL; v++) sums[v] = vf_fma(weight, vf_load(values + t * stride + v * VL), sums[v]);
        }
        float *to = p->mixed + (int64_t)(first + row) * hidden + head * head_dim;
        for (int v = 0; v < head_dim / VL; v++) vf_store(to + v * VL, vf_mul(sums[v], inverse));
    }
}

static void attend(void *context, int first, int last) {
    Pass *p = context;
    const int heads = p->model->num_heads;
    for (int task = first; task < last; task++) {
        const int text = task / heads, start = text ? p->ends[text - 1] : 0;
        attend_head(p, start, p->ends[text] - start, task % heads);
    }
}

/* ---- Norms ---- */

static void norm_rows(void *context, int first, int last) {
    Pass *p = context;
    const int width = p->model->hidden;
    for (int row = first; row < last; row++) {
        float *x = p->states + (int64_t)row * width;
        vf sum = vf_set1(0.0f), squares = vf_set1(0.0f);
        for (int i = 0; i < width; i += VL) sum = vf_add(sum, vf_load(x + i));
        const vf mean = vf_set1(vf_sum(sum) / (float)width);
        for (int i = 0; i < width; i += VL) {
            vf centred = vf_sub(vf_load(x + i), mean);
            squares = vf_fma(centred, centred, squares);
        }
        const vf inverse = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)width + p->model->eps));
        for (int i = 0; i < width; i += VL) {
            vf scaled = vf_mul(vf_mul(vf_sub(vf_load(x + i), mean), inverse), vf_load(p->weight + i));
            vf_store(x + i, vf_add(scaled, vf_load(p->bias + i)));
        }
    }
}

static void norm(Pass *p, const float *weight, const float *bias) {
    p->weight = weight;
    p->bias = bias;
    run_parallel(norm_rows, p, p->num_tokens, ROW_GRAIN);
}

/* ---- The pass ---- */

static void run_layer(Pass *p, int num_texts) {
    const EncoderLayer *layer = p->layer;
    const int tokens = p->num_tokens;
    quantize(p, &layer->qkv, p->states, tokens);
    run_parallel(multiply_qkv, p, layer->qkv.out / BLOCK_OUTPUTS, 2);
    run_parallel(attend, p, num_texts * p->model->num_heads, 1);
    quantize(p, &layer->out, p->mixed, tokens);
    run_parallel(multiply_out, p, layer->out.out / BLOCK_OUTPUTS, 2);
    norm(p, layer->attention_weight, layer->attention_bias);
    quantize(p, &layer->up, p->states, tokens);
    run_parallel(multiply_up, p, layer->up.out / BLOCK_OUTPUTS, 2);
    quantize(p, &layer->down, p->wide, tokens);
    run_parallel(multiply_down, p, layer->down.out / BLOCK_OUTPUTS, 2);
    norm(p, layer->output_weight, layer->output_bias);
}

/* Takes states (tokens, hidden) through all layers, in place. Texts of at most MAX_TEXT_TOKENS; ends: (num_texts). */
void causerie_encode(const EncoderModel *model, float *states, const int32_t *ends, int num_texts, int threads) {
    enter(threads);
    const int tokens = ends[num_texts - 1];
    const int widest = model->inner > 3 * model->hidden ? model->inner : 3 * model->hidden;
    const int64_t largest = model->inner > model->hidden ? model->inner : model->hidden;
    Pass p = {.model = model, .ends = ends, .num_tokens = tokens, .states = states};
    p.wide = scratch(SLOT_WIDE, (int64_t)tokens * widest * 4);
    p.mixed = scratch(SLOT_MIXED, (int64_t)tokens * model->hidden * 4);
    p.x.codes = scratch(SLOT_CODES, tokens * largest);
    p.x.scales = scratch(SLOT_SCALES, tokens * largest / 32 * 4);
    p.x.minus_sums = scratch(SLOT_SUMS, tokens * largest / 32 * 4);
    for (int layer = 0; layer < model->num_layers; layer++) {
        p.layer = model->layers + layer;
        run_layer(&p, num_texts);
    }
    leave();
}

int64_t causerie_encoder_struct_size(int which) {
    switch (which) {
    case 0: return sizeof(EncoderLayer);
    default: return sizeof(EncoderModel);
    }
}
