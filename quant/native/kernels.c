#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "vectors.h"

/* Fewer rows are bound by memory, which streams one block after the other fastest. */
#define PAIRED_FROM_ROWS 3

/* ---- Activations ---- */

void quantize_row(const float *x, int group, Activations *to, int row) {
    int8_t *codes = to->codes + (int64_t)row * to->in;
    for (int g = 0; g < to->groups; g++) {
        const float *part = x + g * group;
        vf top = vf_abs(vf_load(part));
        for (int i = VL; i < group; i += VL) top = vf_max(top, vf_abs(vf_load(part + i)));
        float largest = vf_top(top);
        vf inverse = vf_set1(largest > 0.0f ? 127.0f / largest : 0.0f);
        int32_t sum = 0;
        for (int i = 0; i < group; i += VL) sum += vf_store_int8(codes + g * group + i, vf_mul(vf_load(part + i), inverse));
        to->scales[(int64_t)row * to->groups + g] = largest / 127.0f;
        to->minus_sums[(int64_t)row * to->groups + g] = -sum;
    }
}

/* ---- Products ---- */

#if VL == 16

/* `rows`, `num_blocks` and `bits` are constants where this is called: the loops over rows and blocks unroll and the sums
   stay in registers. Two blocks at a time read every activation once for both. */
INLINE void multiply_tile(const Matrix *m, const int *blocks, const int num_blocks, const Activations *x, int first_row,
                          const int rows, const int bits, const int is_asymmetric, const int has_offsets,
                          float *const *out) {
    const int groups = x->groups, group = m->group;
    const int64_t block_bytes = (int64_t)m->in * BLOCK_OUTPUTS * bits / 8, block_groups = (int64_t)groups * BLOCK_OUTPUTS;
    /* Few sums would wait for each other: each is split in two. */
    const int chains = rows * num_blocks < 4 ? 2 : 1;
    /* The hardware's own prefetcher stops at a page's end. Of two blocks, what is read next lies in the next two. */
    const int64_t ahead = num_blocks == 1 ? 1024 : block_bytes * (blocks[1] - blocks[0] == 1 ? 2 : 1);
    const vi low_bits = _mm512_set1_epi8(15);
    const uint8_t *codes[2];
    const uint16_t *scales[2], *offsets[2];
    vf total[2][MAX_TILE_ROWS];
    for (int b = 0; b < num_blocks; b++) {
        codes[b] = m->codes + blocks[b] * block_bytes;
        scales[b] = m->scales + blocks[b] * block_groups;
        offsets[b] = has_offsets ? m->offsets + blocks[b] * block_groups : 0;
        for (int r = 0; r < rows; r++) total[b][r] = _mm512_setzero_ps();
    }
    for (int g = 0; g < groups; g++) {
        vi sum[2][MAX_TILE_ROWS][2];
        for (int r = 0; r < rows; r++) {
            const vi minus = vi_set1(x->minus_sums[(int64_t)(first_row + r) * groups + g]);
            for (int b = 0; b < num_blocks; b++) {
                if (is_asymmetric) {
                    const uint8_t *zeros = m->zeros + blocks[b] * block_groups + g * BLOCK_OUTPUTS;
                    sum[b][r][0] = vi_mul(vi_load_bytes(zeros), minus);
                } else {
                    sum[b][r][0] = _mm512_slli_epi32(minus, bits - 1);
                }
                if (chains == 2) sum[b][r][1] = _mm512_setzero_si512();
            }
        }
        const int8_t *inputs = x->codes + (int64_t)first_row * x->in + g * group;
        for (int k = 0; k < group; k += 8) {
            vi first[2], second[2];
            for (int b = 0; b < num_blocks; b++) {
                if (bits == 4) {
                    vi both = _mm512_loadu_si512(codes[b]);
                    first[b] = _mm512_and_si512(both, low_bits);
                    second[b] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
                } else {
                    first[b] = _mm512_loadu_si512(codes[b]);
                    second[b] = _mm512_loadu_si512(codes[b] + 64);
                }
                _mm_prefetch((const char *)(codes[b] + ahead), _MM_HINT_T1);
                if (bits == 8) _mm_prefetch((const char *)(codes[b] + ahead + 64), _MM_HINT_T1);
                codes[b] += 16 * bits;
            }
            for (int r = 0; r < rows; r++) {
                const int8_t *at = inputs + (int64_t)r * x->in + k;
                const vi lower = vi_broadcast4(at), upper = vi_broadcast4(at + 4);
                for (int b = 0; b < num_blocks; b++) {
                    sum[b][r][0] = _mm512_dpbusd_epi32(sum[b][r][0], first[b], lower);
                    sum[b][r][chains - 1] = _mm512_dpbusd_epi32(sum[b][r][chains - 1], second[b], upper);
                }
            }
        }
        vf scale[2], offset[2];
        for (int b = 0; b < num_blocks; b++) {
            scale[b] = vf_load_fp16(scales[b] + g * BLOCK_OUTPUTS);
            if (has_offsets) offset[b] = vf_load_fp16(offsets[b] + g * BLOCK_OUTPUTS);
        }
        for (int r = 0; r < rows; r++) {
            const vf step = vf_set1(x->scales[(int64_t)(first_row + r) * groups + g]);
            const vf sum_of_row = vf_set1(-(float)x->minus_sums[(int64_t)(first_row + r) * groups + g]);
            for (int b = 0; b < num_blocks; b++) {
                vi dot = chains == 2 ? vi_add(sum[b][r][0], sum[b][r][1]) : sum[b][r][0];
                total[b][r] = vf_fma(vi_to_float(dot), vf_mul(scale[b], step), total[b][r]);
                if (has_offsets) total[b][r] = vf_fma(offset[b], vf_mul(sum_of_row, step), total[b][r]);
            }
        }
    }
    for (int b = 0; b < num_blocks; b++)
        for (int r = 0; r < rows; r++) vf_store(out[b] + r * BLOCK_OUTPUTS, total[b][r]);
}

#define TILE_ROWS 4

#else

/* 8-bit codes are multiplied as two halves of 4 bits: their pairwise products would overflow 16 bits. */
INLINE void multiply_one(const Matrix *m, int block, const Activations *x, int first_row, const int rows,
                         const int bits, const int is_asymmetric, const int has_offsets, float *out) {
    const int groups = x->groups, group = m->group;
    const int64_t group_bytes = (int64_t)group * BLOCK_OUTPUTS * bits / 8;
    const uint8_t *codes = m->codes + (int64_t)block * groups * group_bytes;
    const uint16_t *scales = m->scales + (int64_t)block * groups * BLOCK_OUTPUTS;
    const vi low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) vf_store(out + r * BLOCK_OUTPUTS + half * VL, _mm256_setzero_ps());
    for (int g = 0; g < groups; g++) {
        for (int half = 0; half < 2; half++) {
            const int64_t column = (int64_t)(block * groups + g) * BLOCK_OUTPUTS + half * VL;
            const vi zero = is_asymmetric ? vi_load_bytes(m->zeros + column) : vi_set1(1 << (bits - 1));
            vi low[MAX_TILE_ROWS], high[MAX_TILE_ROWS];
            for (int r = 0; r < rows; r++) {
                low[r] = _mm256_setzero_si256();
                high[r] = _mm256_setzero_si256();
            }
            for (int k0 = 0; k0 < group; k0 += 32) {
                /* Eight products of at most 2 * 15 * 127 each fit 16 bits. */
                vi low16[MAX_TILE_ROWS], high16[MAX_TILE_ROWS];
                for (int r = 0; r < rows; r++) {
                    low16[r] = _mm256_setzero_si256();
                    high16[r] = _mm256_setzero_si256();
                }
                const uint8_t *at = codes + g * group_bytes + (int64_t)k0 * BLOCK_OUTPUTS * bits / 8 + half * 32;
                for (int k = k0; k < k0 + 32; k += bits == 4 ? 8 : 4) {
                    vi both = _mm256_loadu_si256((const __m256i *)at);
                    vi first = _mm256_and_si256(both, low_bits);
                    vi second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
                    _mm_prefetch((const char *)(at + 1024), _MM_HINT_T1);
                    at += 64;
                    for (int r = 0; r < rows; r++) {
                        const int8_t *input = x->codes + (int64_t)(first_row + r) * x->in + g * group + k;
                        vi lower = vi_broadcast4(input);
                        vi upper = bits == 4 ? vi_broadcast4(input + 4) : lower;
                        low16[r] = _mm256_add_epi16(low16[r], _mm256_maddubs_epi16(first, lower));
                        high16[r] = _mm256_add_epi16(high16[r], _mm256_maddubs_epi16(second, upper));
                    }
                }
                for (int r = 0; r < rows; r++) {
                    low[r] = vi_add(low[r], _mm256_madd_epi16(low16[r], ones));
                    high[r] = vi_add(high[r], _mm256_madd_epi16(high16[r], ones));
                }
            }
            const vf scale = vf_load_fp16(scales + g * BLOCK_OUTPUTS + half * VL);
            for (int r = 0; r < rows; r++) {
                const int64_t at = (int64_t)(first_row + r) * groups + g;
                vi upper = bits == 8 ? _mm256_slli_epi32(high[r], 4) : high[r];
                vi dot = vi_add(vi_add(low[r], upper), vi_mul(zero, vi_set1(x->minus_sums[at])));
                float *to = out + r * BLOCK_OUTPUTS + half * VL;
                vf sum = vf_fma(vi_to_float(dot), vf_mul(scale, vf_set1(x->scales[at])), vf_load(to));
                if (has_offsets) {
                    const vf sum_of_row = vf_set1(-(float)x->minus_sums[at] * x->scales[at]);
                    sum = vf_fma(vf_load_fp16(m->offsets + column), sum_of_row, sum);
                }
                vf_store(to, sum);
            }
        }
    }
}

INLINE void multiply_tile(const Matrix *m, const int *blocks, const int num_blocks, const Activations *x, int first_row,
                          const int rows, const int bits, const int is_asymmetric, const int has_offsets,
                          float *const *out) {
    for (int b = 0; b < num_blocks; b++)
        multiply_one(m, blocks[b], x, first_row, rows, bits, is_asymmetric, has_offsets, out[b]);
}

#define TILE_ROWS 4

#endif

#define MULTIPLY(rows)                                                                                          \
    case rows:                                                                                                  \
        if (m->offsets) multiply_tile(m, blocks, num_blocks, x, first_row, rows, 4, 0, 1, at);                  \
        else if (m->bits == 4 && !m->zeros) multiply_tile(m, blocks, num_blocks, x, first_row, rows, 4, 0, 0, at); \
        else if (m->bits == 4) multiply_tile(m, blocks, num_blocks, x, first_row, rows, 4, 1, 0, at);           \
        else if (!m->zeros) multiply_tile(m, blocks, num_blocks, x, first_row, rows, 8, 0, 0, at);              \
        else multiply_tile(m, blocks, num_blocks, x, first_row, rows, 8, 1, 0, at);                             \
        break;

INLINE void multiply(const Matrix *m, const int *blocks, const int num_blocks, const Activations *x, int first_row,
                     int rows, float *const *out) {
    for (int done = 0; done < rows; done += TILE_ROWS, first_row += TILE_ROWS) {
        float *at[2] = {out[0] + done * BLOCK_OUTPUTS, num_blocks == 2 ? out[1] + done * BLOCK_OUTPUTS : 0};
        switch (rows - done < TILE_ROWS ? rows - done : TILE_ROWS) {
            MULTIPLY(1)
            MULTIPLY(2)
            MULTIPLY(3)
            MULTIPLY(4)
        }
    }
}

void multiply_block(const Matrix *m, int block, const Activations *x, int first_row, int rows, float *out) {
    multiply(m, &block, 1, x, first_row, rows, &out);
}

void multiply_two_blocks(const Matrix *m, const int *blocks, const Activations *x, int first_row, int rows,
                         float *const *out) {
    if (rows < PAIRED_FROM_ROWS) {
        multiply_block(m, blocks[0], x, first_row, rows, out[0]);
        multiply_block(m, blocks[1], x, first_row, rows, out[1]);
    } else {
        multiply(m, blocks, 2, x, first_row, rows, out);
    }
}

void for_each_block(const Matrix *m, int first, int last, const Activations *x, int num_rows, Store store, void *context) {
    float low[MAX_TILE_ROWS * BLOCK_OUTPUTS], high[MAX_TILE_ROWS * BLOCK_OUTPUTS];
    float *const both[2] = {low, high};
    for (int block = first; block < last; block += 2)
        for (int row = 0; row < num_rows; row += MAX_TILE_ROWS) {
            const int rows = num_rows - row < MAX_TILE_ROWS ? num_rows - row : MAX_TILE_ROWS;
            if (block + 1 < last) {
                multiply_two_blocks(m, (const int[]){block, block + 1}, x, row, rows, both);
                store(context, block, row, rows, low);
                store(context, block + 1, row, rows, high);
            } else {
                multiply_block(m, block, x, row, rows, low);
                store(context, block, row, rows, low);
            }
        }
}

/* ---- Threads ---- */

/* One claim word says which run is on, how many pieces it has and which is next: 32, 16 and 16 bits. A worker that
   claims a piece holds that run open, so it may read the run's task only after its claim. The caller never waits for a
   worker to arrive, only for pieces that were claimed: a worker without a core costs nothing. */

#define MAX_THREADS 64
/* Workers spin this many pauses, some tens of microseconds, to bridge the gap between two runs; then they sleep. */
#define WORKER_SPINS 1500
#define CALLER_SPINS 4000

static struct {
    _Alignas(64) _Atomic uint64_t claim;
    _Alignas(64) _Atomic int done;
    _Alignas(64) _Atomic int sleeping;
    _Atomic int active;
    Task task;
    void *context;
    int count, piece;
    int started;
    uint32_t run;
    pthread_mutex_t users, sleep;
    pthread_cond_t wake;
} pool = {.users = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

INLINE int has_piece(uint64_t claim) { return (claim & 0xffff) < (claim >> 16 & 0xffff); }

static void take_pieces(void) {
    while (has_piece(atomic_load_explicit(&pool.claim, memory_order_acquire))) {
        uint64_t claim = atomic_fetch_add_explicit(&pool.claim, 1, memory_order_acq_rel);
        if (!has_piece(claim)) return;
        int first = (int)(claim & 0xffff) * pool.piece, last = first + pool.piece;
        pool.task(pool.context, first, last < pool.count ? last : pool.count);
        atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
    }
}

static void *work(void *index) {
    for (;;) {
        int is_active = (int)(intptr_t)index < atomic_load_explicit(&pool.active, memory_order_relaxed);
        for (int spins = 0; is_active && spins < WORKER_SPINS; spins++) {
            if (has_piece(atomic_load_explicit(&pool.claim, memory_order_acquire))) {
                take_pieces();
                spins = 0;
            }
            _mm_pause();
        }
        pthread_mutex_lock(&pool.sleep);
        is_active = (int)(intptr_t)index < atomic_load(&pool.active);
        /* Who counts here is woken by every run, so a worker that has no part in them does not count. */
        atomic_fetch_add(&pool.sleeping, is_active);
        if (!is_active || !has_piece(atomic_load(&pool.claim))) pthread_cond_wait(&pool.wake, &pool.sleep);
        atomic_fetch_sub(&pool.sleeping, is_active);
        pthread_mutex_unlock(&pool.sleep);
    }
    return 0;
}

void enter(int threads) {
    pthread_mutex_lock(&pool.users);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    while (pool.started < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, 0, work, (void *)(intptr_t)pool.started)) break;
        pthread_detach(thread);
        pool.started++;
    }
    int active = threads - 1 < pool.started ? threads - 1 : pool.started;
    if (active != atomic_load(&pool.active)) {
        pthread_mutex_lock(&pool.sleep);
        atomic_store(&pool.active, active);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
}

void leave(void) { pthread_mutex_unlock(&pool.users); }

int num_threads(void) { return atomic_load_explicit(&pool.active, memory_order_relaxed) + 1; }

void run_parallel(Task task, void *context, int count, int grain) {
    /* Four pieces a thread: a thread that lost its core for a while leaves the rest to the others. */
    int piece = (count + 4 * num_threads() - 1) / (4 * num_threads());
    if (piece < grain) piece = grain;
    int num_pieces = (count + piece - 1) / piece;
    if (num_threads() == 1 || num_pieces <= 1) {
        task(context, 0, count);
        return;
    }
    pool.task = task;
    pool.context = context;
    pool.count = count;
    pool.piece = piece;
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    atomic_store(&pool.claim, (uint64_t)++pool.run << 32 | (uint64_t)num_pieces << 16);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    take_pieces();
    for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < num_pieces; spins++) {
        if (spins < CALLER_SPINS) _mm_pause();
        else sched_yield();
    }
}

void *scratch(int slot, int64_t bytes) {
    static struct { void *memory; int64_t size; } slots[16];
    if (slots[slot].size < bytes) {
        free(slots[slot].memory);
        int64_t size = (bytes + 4095) / 4096 * 4096;
        slots[slot].memory = aligned_alloc(64, (size_t)size);
        if (!slots[slot].memory) abort();
        slots[slot].size = size;
    }
    return slots[slot].memory;
}

/* ---- One product, for a caller that has activations in bf16 or fp32 ---- */

enum { FP32_TO_FP32, BF16_TO_BF16, BF16_TO_FP32 };

typedef struct {
    const Matrix *matrix;
    const void *x;
    void *out;
    int rows, types;
    Activations activations;
} Product;

static void quantize_rows(void *context, int first, int last) {
    Product *p = context;
    int in = p->matrix->in;
    float wide[in];
    for (int row = first; row < last; row++) {
        const float *x = (const float *)p->x + (int64_t)row * in;
        if (p->types != FP32_TO_FP32) {
            const uint16_t *narrow = (const uint16_t *)p->x + (int64_t)row * in;
            for (int i = 0; i < in; i += VL) vf_store(wide + i, vf_load_bf16(narrow + i));
            x = wide;
        }
        quantize_row(x, p->matrix->group, &p->activations, row);
    }
}

static void store_product(void *context, int block, int first_row, int rows, const float *from) {
    const Product *p = context;
    const Matrix *m = p->matrix;
    for (int r = 0; r < rows; r++) {
        int64_t to = (int64_t)(first_row + r) * m->out + block * BLOCK_OUTPUTS;
        for (int i = 0; i < BLOCK_OUTPUTS; i += VL) {
            vf y = vf_load(from + r * BLOCK_OUTPUTS + i);
            if (m->bias) y = vf_add(y, vf_load(m->bias + block * BLOCK_OUTPUTS + i));
            if (p->types == BF16_TO_BF16) vf_store_bf16((uint16_t *)p->out + to + i, y);
            else vf_store((float *)p->out + to + i, y);
        }
    }
}

static void multiply_blocks(void *context, int first, int last) {
    Product *p = context;
    for_each_block(p->matrix, first, last, &p->activations, p->rows, store_product, p);
}

/* out (rows, m->out) = x (rows, m->in) times the matrix, plus bias. */
void causerie_linear(const Matrix *m, const void *x, void *out, int rows, int types, int threads) {
    enter(threads);
    int groups = m->in / m->group;
    Product p = {m, x, out, rows, types, {0}};
    p.activations.in = m->in;
    p.activations.groups = groups;
    p.activations.codes = scratch(0, (int64_t)rows * m->in);
    p.activations.scales = scratch(1, (int64_t)rows * groups * 4);
    p.activations.minus_sums = scratch(2, (int64_t)rows * groups * 4);
    run_parallel(quantize_rows, &p, rows, 8);
    run_parallel(multiply_blocks, &p, m->out / BLOCK_OUTPUTS, 2);
    leave();
}
