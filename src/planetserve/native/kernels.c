/* Kernels for what a decode step does most: products of few rows, attention over pages.
 *
 * Plain C with the vector extensions of GCC and Clang. `isa.inc` is compiled once per
 * instruction set that the target may have; `ps_level` says at run time which one this processor
 * runs, and every entry point takes that level first. Nothing here allocates, checks or keeps
 * state: `planetserve.native` does. All matrices are row-major; widths and strides count elements.
 */

#include <stdint.h>
#include <string.h>

/* Columns of a weight panel: panel p holds outputs [16p, 16p + 16) as [K][16]. */
#define PANEL 16
/* `rows.inc`: rows in all; rows and outputs at once; room for inputs and for
 * vectors of sums, which are to stay in the nearest cache or the next. */
#define MOST_ROWS 16
#define ROWS_AT_ONCE (MAX_ROWS > 6 ? 8 : 4)
#define OUTS_AT_ONCE (MAX_ROWS > 6 ? 3 : 2)
#define NEAR_BYTES (32 << 10)
#define SUMS 512

typedef struct {
    /* Strides of queries [T, heads, key_width] and of outputs [T, heads, value_width]. */
    long query_token, query_head, output_token, output_head;
    long heads, kv_heads, key_width, value_width, page_size;
    long window, chunk; /* 0 for none */
    float scale, softcap; /* softcap 0 for none */
} attention_shape;

/* What a pass of few tokens goes through; element types are the entry point's. */
typedef struct {
    const void *packed, *bias; /* bias or NULL */
    long width, outs;
} product;

typedef struct {
    const void *weight; /* NULL for no norm */
    long width;
    float epsilon;
} norm;

typedef struct {
    norm entry, query_norm, key_norm, middle;
    product query, key, value, output, gate, up, down;
    attention_shape attention;
    const float *sinks;
    void *keys, *values; /* pages */
} layer;

/* A weight [outs, width] of numbers of 4 or 8 bits: factor of its output * scale of its group *
 * (number - zero point of its group). Inputs come in groups of `group`, a multiple of 8; panels as
 * above. 4 bits: [width / 8][16] words of the numbers of eight inputs, lowest first; 8 bits:
 * [width][16]. Scales and zero points: [width / group][16]. */
typedef struct {
    const void *codes, *scales; /* scales or NULL */
    const uint8_t *zeros;       /* or NULL */
    const float *factors, *table; /* what the 16 numbers of 4 bits mean */
    long width, outs, group;
    int kind, scale_kind;
} quantized;

enum { TABLE_4, INT_8, E4M3 };
enum { SCALE_F32, SCALE_BF16, SCALE_F16, SCALE_E8M0, SCALE_E4M3 };

/* The tokens of a pass: rotary tables [tokens, key_width], and what `ps_attend_f32` takes. */
typedef struct {
    long tokens, num_pieces;
    const void *cos, *sin;
    const int64_t *slots, *pieces;
    const int32_t *tables;
    float *scratch;
} pass;

/* Copies keys or values of `count` tokens, [token][head][width] with strides, to slots of pages.
 * Widths and strides are bytes here. */
void ps_store(const char *from, long token_stride, long head_stride, long heads, long head_bytes,
              const int64_t *slots, long count, char *pages) {
    for (long t = 0; t < count; t++) {
        char *to = pages + slots[t] * heads * head_bytes;
        for (long h = 0; h < heads; h++)
            memcpy(to + h * head_bytes, from + t * token_stride + h * head_stride, head_bytes);
    }
}

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(f) CAT(f, ISA)
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
/* A vector that is read again: GCC would load it from memory each time. */
#define KEEP(v) __asm__("" : "+v"(v))
#include <immintrin.h>

#define ISA avx512bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define LANES 16
#define MAX_ROWS 14
#define PANELS 2
#define HAS_DPBF16 1
#include "isa.inc"
#undef ISA
#undef TARGET
#undef HAS_DPBF16

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define HAS_DPBF16 0
#include "isa.inc"
#undef ISA
#undef TARGET
#undef LANES
#undef MAX_ROWS
#undef PANELS

#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MAX_ROWS 6
#define PANELS 1
#include "isa.inc"

#define DISPATCH(f, ...)                        \
    switch (level) {                            \
    case 3: f##_avx512bf16(__VA_ARGS__); break; \
    case 2: f##_avx512(__VA_ARGS__); break;     \
    default: f##_avx2(__VA_ARGS__);             \
    }

/* 0: none of these kernels runs here; else the best level. */
int ps_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

#elif defined(__aarch64__)

#define KEEP(v) __asm__("" : "+w"(v))
#define ISA neon
#define TARGET
#define LANES 4
#define MAX_ROWS 6
#define PANELS 1
#define HAS_DPBF16 0
#include "isa.inc"

#define DISPATCH(f, ...) f##_neon(__VA_ARGS__)
int ps_level(void) { return 1; }

#else
#error "no kernels for this processor"
#endif

/* Raised with every change of what an entry point means; `planetserve.native` checks it. */
int ps_version(void) { return 3; }

/* y[m] = x[m] W^T (+ bias) (+ add[m]) for m < rows. `packed` is W [outs, width] in panels. */
void ps_linear_f32(int level, const float *x, long x_stride, long rows, long width,
                   const float *packed, long outs, const float *bias, const float *add,
                   long add_stride, float *y, long y_stride) {
    DISPATCH(linear_f32, x, x_stride, rows, width, packed, outs, bias, add, add_stride, y, y_stride)
}

/* The same in bfloat16; sums are float32. Panels are [width / 2][16][2]. */
void ps_linear_bf16(int level, const uint16_t *x, long x_stride, long rows, long width,
                    const uint16_t *packed, long outs, const uint16_t *bias, const uint16_t *add,
                    long add_stride, uint16_t *y, long y_stride) {
    DISPATCH(linear_bf16, x, x_stride, rows, width, packed, outs, bias, add, add_stride, y,
             y_stride)
}

/* y[m] = x[m] W^T (+ bias) for m < rows <= MOST_ROWS, with W [outs, width] as it is. */
void ps_linear_rows_f32(int level, const float *x, long x_stride, long rows, long width,
                        const float *w, long outs, const float *bias, float *y, long y_stride) {
    DISPATCH(linear_rows_f32, x, x_stride, rows, width, w, outs, bias, y, y_stride)
}

void ps_linear_rows_bf16(int level, const uint16_t *x, long x_stride, long rows, long width,
                         const uint16_t *w, long outs, const uint16_t *bias, uint16_t *y,
                         long y_stride) {
    DISPATCH(linear_rows_bf16, x, x_stride, rows, width, w, outs, bias, y, y_stride)
}

/* y[m] = x[m] W^T (+ bias) for m < rows. `group_sums` is [rows, groups]: the inputs of each group
 * added up, needed where there are zero points and at most 4 rows. */
void ps_quantized_linear(int level, const quantized *w, const float *x, long x_stride, long rows,
                         const float *group_sums, const float *bias, float *y, long y_stride) {
    DISPATCH(quantized_linear, w, x, x_stride, rows, group_sums, bias, y, y_stride)
}

/* Panel `panel` of W as [width][16]. */
void ps_decode_panel(int level, const quantized *w, long panel, float *out) {
    DISPATCH(decode, w, panel, 0, w->width, out)
}

/* Attention of `pieces` runs of new tokens over pages that hold their keys already.
 *
 * Piece i: {first token, tokens, position of the first, offset of its table in `tables`}.
 * Pages are [page][slot][kv head][width]. `scratch` is float32,
 * heads * (longest context + key_width + value_width) + 64 long. `sinks` per head, or NULL. */
void ps_attend_f32(int level, const attention_shape *shape, const float *query, const float *keys,
                   const float *values, const int32_t *tables, const int64_t *pieces, long count,
                   const float *sinks, float *scratch, float *output) {
    DISPATCH(attend_f32, shape, query, keys, values, tables, pieces, count, sinks, scratch, output)
}

void ps_attend_bf16(int level, const attention_shape *shape, const uint16_t *query,
                    const uint16_t *keys, const uint16_t *values, const int32_t *tables,
                    const int64_t *pieces, long count, const float *sinks, float *scratch,
                    uint16_t *output) {
    DISPATCH(attend_bf16, shape, query, keys, values, tables, pieces, count, sinks, scratch, output)
}

/* y = weight * x / sqrt(mean(x^2) + epsilon), per row. */
void ps_rms_norm_f32(int level, const float *x, long x_stride, long rows, long width,
                     const float *weight, float epsilon, float *y, long y_stride) {
    DISPATCH(rms_norm_f32, x, x_stride, rows, width, weight, epsilon, y, y_stride)
}

void ps_rms_norm_bf16(int level, const uint16_t *x, long x_stride, long rows, long width,
                      const uint16_t *weight, float epsilon, uint16_t *y, long y_stride) {
    DISPATCH(rms_norm_bf16, x, x_stride, rows, width, weight, epsilon, y, y_stride)
}

/* x = x * cos + (-second half of x, first half of x) * sin, per head of an even width; cos and sin
 * are [tokens, width], and callers see to it that they are. */
void ps_rotate_f32(int level, float *x, long token_stride, long tokens, long heads, long width,
                   const float *cos, const float *sin) {
    DISPATCH(rotate_f32, x, token_stride, tokens, heads, width, cos, sin)
}

void ps_rotate_bf16(int level, uint16_t *x, long token_stride, long tokens, long heads, long width,
                    const uint16_t *cos, const uint16_t *sin) {
    DISPATCH(rotate_bf16, x, token_stride, tokens, heads, width, cos, sin)
}

/* y = silu(gate) * up */
void ps_silu_gate_f32(int level, const float *gate, const float *up, long count, float *y) {
    DISPATCH(silu_gate_f32, gate, up, count, y)
}

void ps_silu_gate_bf16(int level, const uint16_t *gate, const uint16_t *up, long count,
                       uint16_t *y) {
    DISPATCH(silu_gate_bf16, gate, up, count, y)
}

/* `count` layers, one after the other, in place on hidden [tokens, width]. `work` has room for
 * tokens * (width + the larger of query + key + value + attended and gate + up) elements. */
void ps_layers_f32(int level, const layer *layers, long count, const pass *pass, float *hidden,
                   float *work) {
    DISPATCH(layers_f32, layers, count, pass, hidden, work)
}

void ps_layers_bf16(int level, const layer *layers, long count, const pass *pass, uint16_t *hidden,
                    uint16_t *work) {
    DISPATCH(layers_bf16, layers, count, pass, hidden, work)
}
