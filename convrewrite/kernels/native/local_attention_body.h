/* The algorithm, for one element type (REAL, INTEGER) and one vector width (VECTOR_BYTES, TARGET); see the .c file.
 *
 * A task is some query rows of one head of one image. Its keys and values are copied once into scratch memory, one
 * plane per channel, with the border already in place; from there every vector holds neighbouring *queries*, so that
 * a tap is one shifted load, and softmax needs no sums across lanes:
 *
 *     s[t] = sum_c q[c] k[c][. + offset(t)]       out[c] = sum_t exp(s[t] - max) v[c][. + offset(t)] / sum_t ...
 *
 * The backward pass computes s again from q, k and the saved log-sum-exp. It keeps p and ds of the last few query
 * rows in a ring; once all queries that see a key row are done, that row's gradients are gathered from the ring
 * (shifted loads again), so that nothing is ever scattered and every sum has a fixed order.
 */

#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define CHANNELS 8 /* channels worked on at a time; scratch is padded to multiples of half of it */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define VEC NAME(vec)
#define IVEC NAME(ivec)
#define LOAD(at) (*(const VEC *)(at))
#define STORE(at) (*(VEC *)(at))
#define UNROLL _Pragma("GCC unroll 8")

typedef REAL VEC __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER IVEC __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* Where a task finds things in scratch memory, the same for all tasks of a call. */
typedef struct {
    int64_t taps, width, value_width; /* channels, rounded up */
    int64_t lanes;                    /* query columns, rounded up */
    int64_t pitch, row;               /* entries of one phase, and of a whole key row */
    int64_t shift;                    /* largest entry offset of a tap */
    int64_t *offset;                  /* of each tap from the first, in a plane of keys */
    int64_t *phase, *entry;           /* of each column of taps */
    reach y, x;
} NAME(layout);
#define LAYOUT NAME(layout)

INLINE VEC NAME(select)(IVEC which, VEC yes, VEC no) { return (VEC)(((IVEC)yes & which) | ((IVEC)no & ~which)); }

INLINE VEC NAME(larger)(VEC a, VEC b) { return NAME(select)(a > b, a, b); }

/* exp(x) to about one unit in the last place, for x below 88 (708); NaN stays NaN, and far below it is 1e-38. */
INLINE VEC NAME(exponential)(VEC x) {
    const int single = sizeof(REAL) == 4;
    const REAL magic = single ? (REAL)12582912.0 : (REAL)6755399441055744.0; /* 1.5 * 2^mantissa bits: rounds */
    VEC low = (VEC){0} + (single ? (REAL)-87.0 : (REAL)-708.0);
    x = NAME(select)(x < low, low, x);
    VEC n = x * (REAL)1.44269504088896340736 + magic;
    IVEC power = (((IVEC)n) + (single ? 127 : 1023)) << (single ? 23 : 52);
    n -= magic;
    VEC r, y;
    if (single) {
        r = x - n * (REAL)0.693359375;
        r = r + n * (REAL)2.12194440e-4;
        y = r * (REAL)1.9875691500e-4 + (REAL)1.3981999507e-3;
        y = y * r + (REAL)8.3334519073e-3;
        y = y * r + (REAL)4.1665795894e-2;
        y = y * r + (REAL)1.6666665459e-1;
        y = y * r + (REAL)5.0000001201e-1;
    } else {
        r = x - n * (REAL)6.93145751953125e-1;
        r = r - n * (REAL)1.42860682030941723212e-6;
        y = r * (REAL)(1.0 / 6227020800.0) + (REAL)(1.0 / 479001600.0);
        y = y * r + (REAL)(1.0 / 39916800.0);
        y = y * r + (REAL)(1.0 / 3628800.0);
        y = y * r + (REAL)(1.0 / 362880.0);
        y = y * r + (REAL)(1.0 / 40320.0);
        y = y * r + (REAL)(1.0 / 5040.0);
        y = y * r + (REAL)(1.0 / 720.0);
        y = y * r + (REAL)(1.0 / 120.0);
        y = y * r + (REAL)(1.0 / 24.0);
        y = y * r + (REAL)(1.0 / 6.0);
        y = y * r + (REAL)0.5;
    }
    y = y * r * r + r + (REAL)1.0;
    return y * (VEC)power;
}

/* s[t] (+)= sum over `channels` of q[c] k[c][offset(t)]; pitches are those of a channel. */
INLINE void NAME(dots)(VEC *s, const REAL *q, int64_t q_pitch, const REAL *k, int64_t k_pitch, const int64_t *offset,
                       int64_t taps, const int channels, const int fresh) {
    VEC held[CHANNELS];
    UNROLL for (int c = 0; c < channels; c++) held[c] = LOAD(q + c * q_pitch);
    for (int64_t t = 0; t < taps; t++) {
        const REAL *at = k + offset[t];
        VEC even = held[0] * LOAD(at), odd = held[1] * LOAD(at + k_pitch);
        UNROLL for (int c = 2; c < channels; c += 2) {
            even += held[c] * LOAD(at + c * k_pitch);
            odd += held[c + 1] * LOAD(at + (c + 1) * k_pitch);
        }
        s[t] = fresh ? even + odd : s[t] + (even + odd);
    }
}

INLINE void NAME(all_dots)(VEC *s, const REAL *q, int64_t q_pitch, const REAL *k, int64_t k_pitch, const LAYOUT *l,
                           int64_t width, const int fresh) {
    int64_t c = 0;
    if (fresh && width >= CHANNELS) NAME(dots)(s, q, q_pitch, k, k_pitch, l->offset, l->taps, CHANNELS, 1);
    else if (fresh) NAME(dots)(s, q, q_pitch, k, k_pitch, l->offset, l->taps, CHANNELS / 2, 1);
    if (fresh) c = least(width, CHANNELS);
    for (; c + CHANNELS <= width; c += CHANNELS)
        NAME(dots)(s, q + c * q_pitch, q_pitch, k + c * k_pitch, k_pitch, l->offset, l->taps, CHANNELS, 0);
    if (c < width)
        NAME(dots)(s, q + c * q_pitch, q_pitch, k + c * k_pitch, k_pitch, l->offset, l->taps, CHANNELS / 2, 0);
}

/* out[c] = factor sum_t s[t] v[c][offset(t)] */
INLINE void NAME(mean)(REAL *out, int64_t out_pitch, const VEC *s, VEC factor, const REAL *v, int64_t v_pitch,
                       const int64_t *offset, int64_t taps, const int channels) {
    VEC sum[CHANNELS];
    UNROLL for (int c = 0; c < channels; c++) sum[c] = (VEC){0};
    for (int64_t t = 0; t < taps; t++) {
        const REAL *at = v + offset[t];
        const VEC weight = s[t];
        UNROLL for (int c = 0; c < channels; c++) sum[c] += weight * LOAD(at + c * v_pitch);
    }
    UNROLL for (int c = 0; c < channels; c++) STORE(out + c * out_pitch) = factor * sum[c];
}

INLINE void NAME(all_means)(REAL *out, int64_t out_pitch, const VEC *s, VEC factor, const REAL *v, int64_t v_pitch,
                            const LAYOUT *l, int64_t width) {
    int64_t c = 0;
    for (; c + CHANNELS <= width; c += CHANNELS)
        NAME(mean)(out + c * out_pitch, out_pitch, s, factor, v + c * v_pitch, v_pitch, l->offset, l->taps, CHANNELS);
    if (c < width)
        NAME(mean)(out + c * out_pitch, out_pitch, s, factor, v + c * v_pitch, v_pitch, l->offset, l->taps,
                   CHANNELS / 2);
}

/* Copies a row of queries (or of the output's gradient), times `factor`, to one line per channel. */
INLINE void NAME(read_row)(REAL *to, int64_t pitch, const REAL *from, int64_t column, int64_t channel, int64_t columns,
                           int64_t channels, REAL factor) {
    if (column == 1)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < columns; x++) to[c * pitch + x] = from[c * channel + x] * factor;
    else
        for (int64_t x = 0; x < columns; x++)
            for (int64_t c = 0; c < channels; c++) to[c * pitch + x] = from[x * column + c * channel] * factor;
}

INLINE void NAME(write_row)(REAL *to, const REAL *from, int64_t pitch, int64_t column, int64_t channel, int64_t columns,
                            int64_t channels) {
    if (column == 1)
        for (int64_t c = 0; c < channels; c++)
            memcpy(to + c * channel, from + c * pitch, (size_t)columns * sizeof(REAL));
    else
        for (int64_t x = 0; x < columns; x++)
            for (int64_t c = 0; c < channels; c++) to[x * column + c * channel] = from[c * pitch + x];
}

/* Columns of the map that windows reach lie in one piece: positions [*begin, *end) of the reach. */
INLINE void NAME(interior)(const arguments *a, const reach *x, int64_t *begin, int64_t *end) {
    *begin = least(most(0, -a->first[1]), x->extent);
    *end = most(*begin, least(x->extent, a->key_columns - a->first[1]));
}

/* Key rows `row`.. of the reach as planes to[c][row][phase][entry], border in place. */
INLINE void NAME(read_keys)(REAL *to, int64_t plane, const REAL *from, const strides *at, const arguments *a,
                            const LAYOUT *l, int64_t row, int64_t rows, int64_t channels) {
    const int64_t step = a->stride[1];
    int64_t begin, end;
    NAME(interior)(a, &l->x, &begin, &end);
    for (int64_t r = 0; r < rows; r++) {
        REAL *line = to + r * l->row;
        const int64_t source = l->y.source[row + r];
        const REAL *in = from + source * at->row;
        if (source < 0) {
            for (int64_t c = 0; c < channels; c++) memset(line + c * plane, 0, (size_t)l->row * sizeof(REAL));
        } else if (step == 1 && at->column == 1) {
            for (int64_t c = 0; c < channels; c++) {
                REAL *out = line + c * plane;
                const REAL *here = in + c * at->channel;
                for (int64_t p = 0; p < begin; p++) out[p] = l->x.source[p] < 0 ? 0 : here[l->x.source[p]];
                if (end > begin)
                    memcpy(out + begin, here + a->first[1] + begin, (size_t)(end - begin) * sizeof(REAL));
                for (int64_t p = end; p < l->x.extent; p++) out[p] = l->x.source[p] < 0 ? 0 : here[l->x.source[p]];
            }
        } else {
            for (int64_t phase = 0; phase < step; phase++)
                for (int64_t e = 0; e < l->x.entries; e++) {
                    const int64_t x = l->x.source[e * step + phase];
                    REAL *out = line + phase * l->pitch + e;
                    const REAL *here = in + x * at->column;
                    if (x < 0) for (int64_t c = 0; c < channels; c++) out[c * plane] = 0;
                    else for (int64_t c = 0; c < channels; c++) out[c * plane] = here[c * at->channel];
                }
        }
    }
}

/* 0 where a key is on the map, else a logit that excludes it: [row][phase][entry]. */
INLINE void NAME(read_mask)(REAL *to, const arguments *a, const LAYOUT *l, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < l->x.entries * a->stride[1]; p++)
            to[r * l->row + p % a->stride[1] * l->pitch + p / a->stride[1]] =
                l->y.source[row + r] < 0 || l->x.source[p] < 0 ? (REAL)-1e30 : 0;
}

/* What all logits of one vector of queries share or add: relative terms, bias, mask. */
typedef struct {
    const REAL *rows, *columns, *bias, *mask; /* of this head, or NULL */
    VEC *row_terms, *column_terms;
} NAME(terms);

INLINE void NAME(logits)(VEC *s, const REAL *q, int64_t q_pitch, const REAL *k, int64_t plane, const arguments *a,
                         const LAYOUT *l, const NAME(terms) *terms, int64_t at) {
    NAME(all_dots)(s, q, q_pitch, k + at, plane, l, l->width, 1);
    const int64_t kh = a->window[0], kw = a->window[1];
    if (terms->rows)
        for (int64_t y = 0; y < kh; y++) {
            VEC sum = {0};
            for (int64_t c = 0; c < a->width; c++) sum += LOAD(q + c * q_pitch) * terms->rows[c * kh + y];
            for (int64_t x = 0; x < kw; x++) s[y * kw + x] += sum;
        }
    if (terms->columns)
        for (int64_t x = 0; x < kw; x++) {
            VEC sum = {0};
            for (int64_t c = 0; c < a->width; c++) sum += LOAD(q + c * q_pitch) * terms->columns[c * kw + x];
            for (int64_t y = 0; y < kh; y++) s[y * kw + x] += sum;
        }
    if (terms->bias)
        for (int64_t t = 0; t < l->taps; t++) s[t] += terms->bias[t];
    if (terms->mask)
        for (int64_t t = 0; t < l->taps; t++) s[t] += LOAD(terms->mask + at + l->offset[t]);
}

TARGET static int NAME(find_layout)(LAYOUT *l, const arguments *a) {
    const int64_t kh = a->window[0], kw = a->window[1], step = a->stride[1], half = CHANNELS / 2;
    memset(l, 0, sizeof *l);
    if (find_reach(&l->y, a, 0) || find_reach(&l->x, a, 1)) return NO_MEMORY;
    l->taps = kh * kw;
    l->width = round_up(a->width, half);
    l->value_width = round_up(a->value_width, half);
    l->lanes = round_up(a->query_columns, LANES);
    l->shift = a->dilation[1] * (kw - 1) / step;
    l->pitch = round_up(most(l->lanes + l->shift, round_up(l->x.entries, LANES)), 4);
    l->row = l->pitch * step;
    l->offset = malloc((size_t)(l->taps + 2 * kw) * sizeof(int64_t));
    if (!l->offset) return NO_MEMORY;
    l->phase = l->offset + l->taps;
    l->entry = l->phase + kw;
    for (int64_t x = 0; x < kw; x++) {
        l->phase[x] = x * a->dilation[1] % step;
        l->entry[x] = x * a->dilation[1] / step;
        for (int64_t y = 0; y < kh; y++)
            l->offset[y * kw + x] = y * a->dilation[0] * l->row + l->phase[x] * l->pitch + l->entry[x];
    }
    return OK;
}

TARGET static void NAME(free_layout)(LAYOUT *l) {
    free(l->offset);
    free(l->y.source);
    free(l->x.source);
}

INLINE const REAL *NAME(of_head)(const void *from, const strides *at, int64_t image, int64_t head) {
    return (const REAL *)from + image * at->batch + head * at->head;
}

INLINE NAME(terms) NAME(find_terms)(const arguments *a, int64_t head, const REAL *mask) {
    NAME(terms) found = {0};
    if (a->rows) found.rows = (const REAL *)a->rows + head * a->width * a->window[0];
    if (a->columns) found.columns = (const REAL *)a->columns + head * a->width * a->window[1];
    if (a->bias) found.bias = (const REAL *)a->bias + head * a->window[0] * a->window[1];
    found.mask = mask;
    return found;
}

/* ---- forward ---- */

TARGET static void NAME(forward_rows)(const arguments *a, const LAYOUT *l, REAL *scratch, int64_t image, int64_t head,
                                      int64_t begin, int64_t end, int64_t plane) {
    const int64_t rows = (end - begin - 1) * a->stride[0] + a->dilation[0] * (a->window[0] - 1) + 1;
    VEC *s = (VEC *)scratch;
    REAL *keys = scratch + l->taps * LANES, *values = keys + l->width * plane;
    REAL *q = values + l->value_width * plane, *out = q + l->width * l->lanes, *sums = out + l->value_width * l->lanes;
    REAL *mask = a->border == MASK ? sums + l->lanes : NULL;
    const NAME(terms) terms = NAME(find_terms)(a, head, mask);
    NAME(read_keys)(keys, plane, NAME(of_head)(a->k, &a->k_at, image, head), &a->k_at, a, l, begin * a->stride[0], rows,
                    a->width);
    NAME(read_keys)(values, plane, NAME(of_head)(a->v, &a->v_at, image, head), &a->v_at, a, l, begin * a->stride[0],
                    rows, a->value_width);
    if (mask) NAME(read_mask)(mask, a, l, begin * a->stride[0], rows);
    for (int64_t y = begin; y < end; y++) {
        const int64_t line = (y - begin) * a->stride[0] * l->row;
        NAME(read_row)(q, l->lanes, NAME(of_head)(a->q, &a->q_at, image, head) + y * a->q_at.row, a->q_at.column,
                       a->q_at.channel, a->query_columns, a->width, (REAL)a->scale);
        for (int64_t x = 0; x < l->lanes; x += LANES) {
            NAME(logits)(s, q + x, l->lanes, keys, plane, a, l, &terms, line + x);
            VEC top = s[0], sum = {0};
            for (int64_t t = 1; t < l->taps; t++) top = NAME(larger)(s[t], top);
            for (int64_t t = 0; t < l->taps; t++) {
                s[t] = NAME(exponential)(s[t] - top);
                sum += s[t];
            }
            NAME(all_means)(out + x, l->lanes, s, (REAL)1.0 / sum, values + line + x, plane, l, l->value_width);
            for (int64_t i = 0; i < LANES; i++) sums[x + i] = top[i] + (REAL)log((double)sum[i]);
        }
        NAME(write_row)((REAL *)NAME(of_head)(a->out, &a->out_at, image, head) + y * a->out_at.row, out, l->lanes,
                        a->out_at.column, a->out_at.channel, a->query_columns, a->value_width);
        REAL *lse = (REAL *)a->lse + (image * a->query_rows + y) * a->query_columns * a->heads + head;
        for (int64_t x = 0; x < a->query_columns; x++) lse[x * a->heads] = sums[x];
    }
}

TARGET static int NAME(forward)(const arguments *a) {
    LAYOUT l;
    int status = NAME(find_layout)(&l, a);
    if (status == OK) {
        const int64_t span = a->dilation[0] * (a->window[0] - 1) + 1, heads = a->batch * a->heads;
        const int64_t row_bytes = (l.width + l.value_width) * l.row * (int64_t)sizeof(REAL);
        /* Rows of a task: keys and values that stay in the second-level cache, and work for every thread. */
        int64_t rows = most(262144 / row_bytes - span, 2 * (span - 1)) / a->stride[0] + 1;
        const int64_t wanted = (2 * a->threads + heads - 1) / heads;
        if (a->threads > 1) rows = least(rows, most((a->query_rows + wanted - 1) / wanted, 1));
        rows = least(rows, a->query_rows);
        const int64_t tiles = (a->query_rows + rows - 1) / rows;
        rows = (a->query_rows + tiles - 1) / tiles;
        const int64_t plane = ((rows - 1) * a->stride[0] + span) * l.row + 16;
        const int64_t size = l.taps * LANES + (l.width + l.value_width) * (plane + l.lanes) + l.lanes +
                             (a->border == MASK ? plane : 0);
#pragma omp parallel num_threads((int)a->threads)
        {
            const unsigned before = flush_small();
            REAL *scratch = zeros(size * (int64_t)sizeof(REAL));
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads * tiles; task++) {
                const int64_t begin = task % tiles * rows, end = least(begin + rows, a->query_rows);
                if (scratch && begin < end)
                    NAME(forward_rows)(a, &l, scratch, task / tiles / a->heads, task / tiles % a->heads, begin, end,
                                       plane);
            }
            if (!scratch) {
#pragma omp atomic write
                status = NO_MEMORY;
            }
            free(scratch);
            flush_as_before(before);
        }
    }
    NAME(free_layout)(&l);
    return status;
}

/* ---- backward ---- */

/* One head's scratch. Ring slots hold p, ds, q and grad of one query row, `shift` zeros before and zeros behind. */
typedef struct {
    int64_t plane, slots, slot_pitch;
    VEC *s, *g, *row_sums, *column_sums, *grad_rows, *grad_columns, *grad_bias;
    REAL *keys, *values, *grad_keys, *grad_values; /* [c][row][phase][entry]; the gradients' rows are the map's */
    int64_t grad_plane;
    REAL *p, *ds, *q, *grad; /* [slot][tap or channel][entry] */
    REAL *row, *lse, *delta, *mask;
} NAME(head);
#define HEAD NAME(head)

/* Lays out scratch memory from `base`; with base NULL it only counts. Returns the elements needed. */
TARGET static int64_t NAME(find_head)(HEAD *h, REAL *base, const arguments *a, const LAYOUT *l) {
    int64_t used = 0;
#define TAKE(what, size) h->what = base ? (void *)(base + used) : NULL, used += round_up((size), LANES)
    const int64_t kh = a->window[0], kw = a->window[1];
    h->plane = l->y.extent * l->row + 16;
    h->grad_plane = a->key_rows * l->row + 16;
    h->slots = least(a->dilation[0] * (kh - 1) / a->stride[0] + 1, a->query_rows);
    h->slot_pitch = l->shift + most(l->lanes, round_up(l->x.entries, LANES));
    TAKE(s, l->taps * LANES);
    TAKE(g, l->taps * LANES);
    TAKE(row_sums, kh * LANES);
    TAKE(column_sums, kw * LANES);
    TAKE(grad_rows, l->width * kh * LANES);
    TAKE(grad_columns, l->width * kw * LANES);
    TAKE(grad_bias, l->taps * LANES);
    TAKE(row, most(l->width, l->value_width) * l->lanes + a->key_columns);
    TAKE(lse, l->lanes);
    TAKE(delta, l->lanes);
    TAKE(mask, a->border == MASK ? h->plane : 0);
    TAKE(p, h->slots * l->taps * h->slot_pitch);
    TAKE(ds, h->slots * l->taps * h->slot_pitch);
    TAKE(q, h->slots * l->width * h->slot_pitch);
    TAKE(grad, h->slots * l->value_width * h->slot_pitch);
    TAKE(keys, l->width * h->plane);
    TAKE(values, l->value_width * h->plane);
    TAKE(grad_keys, l->width * h->grad_plane);
    TAKE(grad_values, l->value_width * h->grad_plane);
#undef TAKE
    return used;
}

/* Gradients of the relative terms, and what they add to that of q (still without the scale). */
INLINE void NAME(relative_backward)(const HEAD *h, const arguments *a, const LAYOUT *l, const NAME(terms) *terms,
                                    const REAL *q, REAL *grad_q, REAL scale) {
    const int64_t kh = a->window[0], kw = a->window[1];
    for (int64_t y = 0; y < kh && terms->rows; y++) {
        VEC sum = {0};
        for (int64_t x = 0; x < kw; x++) sum += h->s[y * kw + x];
        h->row_sums[y] = sum;
    }
    for (int64_t x = 0; x < kw && terms->columns; x++) {
        VEC sum = {0};
        for (int64_t y = 0; y < kh; y++) sum += h->s[y * kw + x];
        h->column_sums[x] = sum;
    }
    for (int64_t c = 0; c < a->width && (terms->rows || terms->columns); c++) {
        const VEC held = LOAD(q + c * h->slot_pitch);
        VEC sum = {0};
        for (int64_t y = 0; y < kh && terms->rows; y++) {
            sum += h->row_sums[y] * terms->rows[c * kh + y];
            h->grad_rows[c * kh + y] += h->row_sums[y] * held;
        }
        for (int64_t x = 0; x < kw && terms->columns; x++) {
            sum += h->column_sums[x] * terms->columns[c * kw + x];
            h->grad_columns[c * kw + x] += h->column_sums[x] * held;
        }
        STORE(grad_q + c * l->lanes) += scale * sum;
    }
    for (int64_t t = 0; t < l->taps && terms->bias; t++) h->grad_bias[t] += h->s[t];
}

/* p and ds of query row y into its ring slot, and the gradient of q. */
INLINE void NAME(backward_row)(const HEAD *h, const arguments *a, const LAYOUT *l, int64_t image, int64_t head,
                               int64_t y, const NAME(terms) *terms) {
    const int64_t slot = y % h->slots, pitch = h->slot_pitch, line = y * a->stride[0] * l->row;
    const REAL scale = (REAL)a->scale;
    REAL *p = h->p + slot * l->taps * pitch + l->shift, *ds = h->ds + slot * l->taps * pitch + l->shift;
    REAL *q = h->q + slot * l->width * pitch + l->shift, *grad = h->grad + slot * l->value_width * pitch + l->shift;
    NAME(read_row)(q, pitch, NAME(of_head)(a->q, &a->q_at, image, head) + y * a->q_at.row, a->q_at.column,
                   a->q_at.channel, a->query_columns, a->width, scale);
    NAME(read_row)(grad, pitch, NAME(of_head)(a->grad, &a->grad_at, image, head) + y * a->grad_at.row,
                   a->grad_at.column, a->grad_at.channel, a->query_columns, a->value_width, (REAL)1.0);
    NAME(read_row)(h->row, l->lanes, NAME(of_head)(a->out, &a->out_at, image, head) + y * a->out_at.row,
                   a->out_at.column, a->out_at.channel, a->query_columns, a->value_width, (REAL)1.0);
    const REAL *lse = (const REAL *)a->lse + (image * a->query_rows + y) * a->query_columns * a->heads + head;
    for (int64_t x = 0; x < a->query_columns; x++) h->lse[x] = lse[x * a->heads];
    for (int64_t x = 0; x < a->query_columns; x++) h->delta[x] = 0;
    for (int64_t c = 0; c < a->value_width; c++)
        for (int64_t x = 0; x < a->query_columns; x++) h->delta[x] += h->row[c * l->lanes + x] * grad[c * pitch + x];
    for (int64_t x = 0; x < l->lanes; x += LANES) {
        IVEC real = {0}; /* all ones in lanes that are queries */
        for (int64_t i = 0; i < LANES; i++) real[i] = x + i < a->query_columns ? -1 : 0;
        const VEC sums = LOAD(h->lse + x), delta = LOAD(h->delta + x);
        NAME(logits)(h->s, q + x, pitch, h->keys, h->plane, a, l, terms, line + x);
        NAME(all_dots)(h->g, grad + x, pitch, h->values + line + x, h->plane, l, l->value_width, 1);
        for (int64_t t = 0; t < l->taps; t++) {
            const VEC weight = (VEC)((IVEC)NAME(exponential)(h->s[t] - sums) & real);
            STORE(p + t * pitch + x) = weight;
            h->s[t] = (VEC)((IVEC)(weight * (h->g[t] - delta)) & real);
            STORE(ds + t * pitch + x) = h->s[t];
        }
        NAME(all_means)(h->row + x, l->lanes, h->s, (VEC){0} + scale, h->keys + line + x, h->plane, l, l->width);
        NAME(relative_backward)(h, a, l, terms, q + x, h->row + x, scale);
    }
    NAME(write_row)((REAL *)NAME(of_head)(a->grad_q, &a->grad_q_at, image, head) + y * a->grad_q_at.row, h->row,
                    l->lanes, a->grad_q_at.column, a->grad_q_at.channel, a->query_columns, a->width);
}

/* to[c][entry] += sum of weight[t] x[c] over the queries whose tap t is this key */
INLINE void NAME(gather)(REAL *to, int64_t to_pitch, const REAL *weight, const REAL *x, int64_t all_channels,
                         const HEAD *h, const arguments *a, const LAYOUT *l, int64_t key_row, int64_t phase,
                         const int channels) {
    const int64_t pitch = h->slot_pitch;
    VEC sum[CHANNELS];
    UNROLL for (int c = 0; c < channels; c++) sum[c] = LOAD(to + c * to_pitch);
    for (int64_t ty = 0; ty < a->window[0]; ty++) {
        const int64_t from = key_row - ty * a->dilation[0], y = from / a->stride[0];
        if (from < 0 || from % a->stride[0] || y >= a->query_rows) continue;
        const REAL *w = weight + (y % h->slots * l->taps + ty * a->window[1]) * pitch;
        const REAL *at = x + y % h->slots * all_channels * pitch;
        for (int64_t tx = 0; tx < a->window[1]; tx++) {
            if (l->phase[tx] != phase) continue;
            const VEC held = LOAD(w + tx * pitch - l->entry[tx]);
            UNROLL for (int c = 0; c < channels; c++) sum[c] += held * LOAD(at + c * pitch - l->entry[tx]);
        }
    }
    UNROLL for (int c = 0; c < channels; c++) STORE(to + c * to_pitch) = sum[c];
}

INLINE void NAME(gather_row)(REAL *to, const REAL *weight, const REAL *x, int64_t width, const HEAD *h,
                             const arguments *a, const LAYOUT *l, int64_t key_row) {
    const int64_t source = l->y.source[key_row];
    if (source < 0) return;
    for (int64_t phase = 0; phase < a->stride[1]; phase++)
        for (int64_t e = 0; e < l->x.entries; e += LANES) {
            REAL *out = to + source * l->row + phase * l->pitch + e;
            const REAL *w = weight + l->shift + e, *from = x + l->shift + e;
            int64_t c = 0;
            for (; c + CHANNELS <= width; c += CHANNELS)
                NAME(gather)(out + c * h->grad_plane, h->grad_plane, w, from + c * h->slot_pitch, width, h, a, l,
                             key_row, phase, CHANNELS);
            if (c < width)
                NAME(gather)(out + c * h->grad_plane, h->grad_plane, w, from + c * h->slot_pitch, width, h, a, l,
                             key_row, phase, CHANNELS / 2);
        }
}

/* Planes of gradients back to the map: what windows saw beyond the border is added to the key it was. */
INLINE void NAME(write_keys)(REAL *to, const strides *at, const REAL *from, REAL *line, const HEAD *h,
                             const arguments *a, const LAYOUT *l, int64_t channels) {
    const int64_t step = a->stride[1];
    int64_t begin, end;
    NAME(interior)(a, &l->x, &begin, &end);
    for (int64_t row = 0; row < a->key_rows; row++)
        for (int64_t c = 0; c < channels; c++) {
            const REAL *in = from + c * h->grad_plane + row * l->row;
            REAL *out = at->column == 1 ? to + row * at->row + c * at->channel : line;
            memset(out, 0, (size_t)a->key_columns * sizeof(REAL));
            if (step == 1) {
                if (end > begin) memcpy(out + a->first[1] + begin, in + begin, (size_t)(end - begin) * sizeof(REAL));
            } else {
                for (int64_t x = begin; x < end; x++)
                    out[a->first[1] + x] = in[x % step * l->pitch + x / step];
            }
            for (int64_t x = 0; x < begin; x++)
                if (l->x.source[x] >= 0) out[l->x.source[x]] += in[x % step * l->pitch + x / step];
            for (int64_t x = end; x < l->x.extent; x++)
                if (l->x.source[x] >= 0) out[l->x.source[x]] += in[x % step * l->pitch + x / step];
            if (at->column != 1)
                for (int64_t x = 0; x < a->key_columns; x++)
                    to[row * at->row + x * at->column + c * at->channel] = line[x];
        }
}

INLINE void NAME(write_sums)(void *to, int64_t index, const VEC *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        REAL sum = 0;
        for (int64_t lane = 0; lane < LANES; lane++) sum += from[i][lane];
        ((REAL *)to)[index * count + i] = sum;
    }
}

TARGET static void NAME(backward_head)(const arguments *a, const LAYOUT *l, const HEAD *h, int64_t image,
                                       int64_t head) {
    const int64_t task = image * a->heads + head, vector = LANES * (int64_t)sizeof(REAL);
    const NAME(terms) terms = NAME(find_terms)(a, head, a->border == MASK ? h->mask : NULL);
    NAME(read_keys)(h->keys, h->plane, NAME(of_head)(a->k, &a->k_at, image, head), &a->k_at, a, l, 0, l->y.extent,
                    a->width);
    NAME(read_keys)(h->values, h->plane, NAME(of_head)(a->v, &a->v_at, image, head), &a->v_at, a, l, 0, l->y.extent,
                    a->value_width);
    if (terms.mask) NAME(read_mask)(h->mask, a, l, 0, l->y.extent);
    memset(h->grad_keys, 0, (size_t)(l->width * h->grad_plane) * sizeof(REAL));
    memset(h->grad_values, 0, (size_t)(l->value_width * h->grad_plane) * sizeof(REAL));
    memset(h->grad_rows, 0, (size_t)(l->width * a->window[0] * vector));
    memset(h->grad_columns, 0, (size_t)(l->width * a->window[1] * vector));
    memset(h->grad_bias, 0, (size_t)(l->taps * vector));
    for (int64_t y = 0; y < a->query_rows; y++) {
        NAME(backward_row)(h, a, l, image, head, y, &terms);
        const int64_t done = y + 1 < a->query_rows ? least((y + 1) * a->stride[0], l->y.extent) : l->y.extent;
        for (int64_t row = y * a->stride[0]; row < done; row++) {
            NAME(gather_row)(h->grad_keys, h->ds, h->q, l->width, h, a, l, row);
            NAME(gather_row)(h->grad_values, h->p, h->grad, l->value_width, h, a, l, row);
        }
    }
    REAL *line = h->row;
    NAME(write_keys)((REAL *)NAME(of_head)(a->grad_k, &a->grad_k_at, image, head), &a->grad_k_at, h->grad_keys, line, h,
                     a, l, a->width);
    NAME(write_keys)((REAL *)NAME(of_head)(a->grad_v, &a->grad_v_at, image, head), &a->grad_v_at, h->grad_values, line,
                     h, a, l, a->value_width);
    if (terms.rows) NAME(write_sums)(a->grad_rows, task, h->grad_rows, a->width * a->window[0]);
    if (terms.columns) NAME(write_sums)(a->grad_columns, task, h->grad_columns, a->width * a->window[1]);
    if (terms.bias) NAME(write_sums)(a->grad_bias, task, h->grad_bias, l->taps);
}

TARGET static int NAME(backward)(const arguments *a) {
    LAYOUT l;
    int status = NAME(find_layout)(&l, a);
    if (status == OK) {
        const int64_t heads = a->batch * a->heads;
#pragma omp parallel num_threads((int)least(a->threads, heads))
        {
            const unsigned before = flush_small();
            HEAD h;
            REAL *scratch = zeros(NAME(find_head)(&h, NULL, a, &l) * (int64_t)sizeof(REAL));
            NAME(find_head)(&h, scratch, a, &l);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads; task++)
                if (scratch) NAME(backward_head)(a, &l, &h, task / a->heads, task % a->heads);
            if (!scratch) {
#pragma omp atomic write
                status = NO_MEMORY;
            }
            free(scratch);
            flush_as_before(before);
        }
    }
    NAME(free_layout)(&l);
    return status;
}

#include "outlook_body.h"

#undef LANES
#undef CHANNELS
#undef INLINE
#undef VEC
#undef IVEC
#undef LOAD
#undef STORE
#undef UNROLL
#undef LAYOUT
#undef HEAD
#undef NAME
#undef REAL
#undef INTEGER
