/* Products of packed integer weights with int8 activations, and the threads that share them.

   Weights keep their codes: 4 or 8 bits, scale and zero point for each group of inputs. Activations are quantised for
   each row and group. A row's result is computed by the same operations in the same order whatever other rows, threads
   or tiles there are. quant/native/linear.py packs what this file reads and mirrors the structs. */
#ifndef CAUSERIE_KERNELS_H
#define CAUSERIE_KERNELS_H

#include <stdint.h>

typedef struct {
    const uint8_t *codes;   /* (blocks, in * 16 * bits / 8): see linear.py */
    const uint16_t *scales; /* (blocks, groups, 16) fp16 */
    const uint8_t *zeros;   /* (blocks, groups, 16), or null: the middle of the grid everywhere */
    const uint16_t *offsets; /* (blocks, groups, 16) fp16, added to a group's weights, or null */
    const float *bias;      /* (out), or null */
    int32_t in, out, group, bits;
} Matrix;

/* Rows of activations as the products read them. */
typedef struct {
    int8_t *codes;   /* (rows, in) */
    float *scales;   /* (rows, groups) */
    int32_t *minus_sums; /* (rows, groups): minus the sum of a group's codes */
    int32_t in, groups;
} Activations;

#define MAX_TILE_ROWS 8

typedef void (*Task)(void *context, int first, int last);

/* Quantise x (in), with `group` inputs to a scale, as row `row`. */
void quantize_row(const float *x, int group, Activations *to, int row);

/* out (rows, 16): outputs of one block for `rows` <= MAX_TILE_ROWS rows from `first_row` on, without bias. */
void multiply_block(const Matrix *matrix, int block, const Activations *x, int first_row, int rows, float *out);
void multiply_two_blocks(const Matrix *matrix, const int *blocks, const Activations *x, int first_row, int rows,
                         float *const *out);

/* Calls `store` with the outputs (rows, 16) of every block in [first, last), a few rows at a time. */
typedef void (*Store)(void *context, int block, int first_row, int rows, const float *outputs);
void for_each_block(const Matrix *matrix, int first, int last, const Activations *x, int num_rows, Store store,
                    void *context);

/* Calls task over [0, count) on the calling thread and the workers, at least `grain` items at a time; returns when all
   is done. Only between `enter` and `leave`. */
void run_parallel(Task task, void *context, int count, int grain);
void enter(int threads);
void leave(void);
int num_threads(void);

/* Memory of at least `bytes`, aligned to 64, that stays valid until the next call with the same `slot`. */
void *scratch(int slot, int64_t bytes);

#endif
