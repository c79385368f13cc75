/* Local and outlook attention on CPU: a plain C interface, no torch headers, OpenMP where the compiler has it.
 *
 * The algorithms are in local_attention_body.h and outlook_body.h. They are compiled once for each element type and
 * instruction set, and PICK picks at run time. One call does one whole tensor; tensors may have any strides.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { REFLECT = 0, ZERO = 1, MASK = 2 };
enum { OK = 0, NO_MEMORY = 1 };

/* Element strides of (batch, row, column, head, channel). */
typedef struct {
    int64_t batch, row, column, head, channel;
} strides;

/* Must stay the same as Arguments in library.py. Pointers that are not used are NULL. */
typedef struct {
    int64_t batch, heads, width, value_width; /* width: channels of q and k in a head; value_width: of v */
    int64_t query_rows, query_columns, key_rows, key_columns;
    int64_t window[2], stride[2], dilation[2], first[2]; /* first: key position of the first tap of query 0 */
    int64_t border, threads, is_double;
    double scale;
    const void *q, *k, *v;
    const void *rows, *columns, *bias; /* contiguous (heads, width, kh), (heads, width, kw), (heads, kh * kw) */
    void *out, *lse;                   /* lse: contiguous (batch, query_rows, query_columns, heads) */
    const void *grad;
    void *grad_q, *grad_k, *grad_v;
    void *grad_rows, *grad_columns, *grad_bias; /* contiguous, with (batch,) in front: summed by the caller */
    strides q_at, k_at, v_at, out_at, grad_at, grad_q_at, grad_k_at, grad_v_at;
} arguments;

/* Keys along one axis as they lie in scratch memory: position p of the windows' reach is entry p / stride of phase
 * p % stride, so that neighbouring queries always meet neighbouring entries. */
typedef struct {
    int64_t extent;  /* positions that all windows together reach */
    int64_t entries; /* of one phase */
    int32_t *source; /* position -> key on the map, or -1 where there is none */
} reach;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static int64_t mirrored(int64_t position, int64_t size) {
    if (size == 1) return 0;
    int64_t period = 2 * (size - 1), folded = position % period;
    if (folded < 0) folded += period;
    return least(folded, period - folded);
}

static int find_reach(reach *to, const arguments *a, int axis) {
    int64_t count = axis ? a->query_columns : a->query_rows, size = axis ? a->key_columns : a->key_rows;
    to->extent = (count - 1) * a->stride[axis] + a->dilation[axis] * (a->window[axis] - 1) + 1;
    to->entries = (to->extent + a->stride[axis] - 1) / a->stride[axis];
    int64_t positions = to->entries * a->stride[axis];
    to->source = malloc((size_t)positions * sizeof(int32_t));
    if (!to->source) return NO_MEMORY;
    for (int64_t p = 0; p < positions; p++) {
        int64_t at = a->first[axis] + p;
        int inside = at >= 0 && at < size;
        if (p >= to->extent) to->source[p] = -1;
        else to->source[p] = (int32_t)(inside ? at : a->border == REFLECT ? mirrored(at, size) : -1);
    }
    return OK;
}

/* 64-byte aligned memory, all zero. */
static void *zeros(int64_t bytes) {
    void *memory = aligned_alloc(64, (size_t)round_up(most(bytes, 64), 64));
    if (memory) memset(memory, 0, (size_t)round_up(most(bytes, 64), 64));
    return memory;
}

/* Has this thread's arithmetic flush numbers too small for full precision to zero, and tells what it did before.
 * Weights of keys far below the maximum are such numbers once multiplied with a gradient, and each would cost as much
 * as a hundred others: a training step of a whole network took three times as long. */
static unsigned flush_small(void) {
#if defined(__SSE2__) && (defined(__GNUC__) || defined(__clang__))
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040u); /* results, and arguments */
    return before;
#else
    return 0;
#endif
}

static void flush_as_before(unsigned before) {
#if defined(__SSE2__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_ia32_ldmxcsr(before);
#else
    (void)before;
#endif
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define VECTOR_BYTES 16
#define TARGET
#define NAME(x) JOIN(x, _float_base)
#define REAL float
#define INTEGER int32_t
#include "local_attention_body.h"
#define NAME(x) JOIN(x, _double_base)
#define REAL double
#define INTEGER int64_t
#include "local_attention_body.h"
#undef VECTOR_BYTES
#undef TARGET

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_X86 1
#define VECTOR_BYTES 32
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) JOIN(x, _float_avx2)
#define REAL float
#define INTEGER int32_t
#include "local_attention_body.h"
#define NAME(x) JOIN(x, _double_avx2)
#define REAL double
#define INTEGER int64_t
#include "local_attention_body.h"
#undef VECTOR_BYTES
#undef TARGET

#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define NAME(x) JOIN(x, _float_avx512)
#define REAL float
#define INTEGER int32_t
#include "local_attention_body.h"
#define NAME(x) JOIN(x, _double_avx512)
#define REAL double
#define INTEGER int64_t
#include "local_attention_body.h"
#undef VECTOR_BYTES
#undef TARGET
#endif

/* The widest instruction set of this machine: 0 the compiler's base, 1 AVX2, 2 AVX-512. */
int local_attention_level(void) {
#ifdef HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* sizeof(arguments), for the caller to check against its own. */
int64_t local_attention_size(void) { return (int64_t)sizeof(arguments); }

#define PICK(direction)                                                                            \
    level = least(level, local_attention_level());                                                 \
    if (level >= 2) return a->is_double ? WIDEST(direction, double) : WIDEST(direction, float);    \
    if (level == 1) return a->is_double ? WIDE(direction, double) : WIDE(direction, float);        \
    return a->is_double ? JOIN(direction, _double_base)(a) : JOIN(direction, _float_base)(a)
#ifdef HAS_X86
#define WIDEST(direction, type) JOIN(direction, JOIN(_, JOIN(type, _avx512)))(a)
#define WIDE(direction, type) JOIN(direction, JOIN(_, JOIN(type, _avx2)))(a)
#else
#define WIDEST(direction, type) JOIN(direction, JOIN(_, JOIN(type, _base)))(a)
#define WIDE(direction, type) JOIN(direction, JOIN(_, JOIN(type, _base)))(a)
#endif

/* Fills out and lse. `level` caps the instruction set. */
int local_attention_forward(const arguments *a, int level) { PICK(forward); }

/* Fills every grad_* that is not NULL, from q, k, v, out, lse and grad. */
int local_attention_backward(const arguments *a, int level) { PICK(backward); }

/* Outlook attention, with `arguments` as outlook_body.h reads them: fills out. */
int outlook_forward(const arguments *a, int level) { PICK(outlook_forward); }

/* Fills grad_q and grad_v. */
int outlook_backward(const arguments *a, int level) { PICK(outlook_backward); }
