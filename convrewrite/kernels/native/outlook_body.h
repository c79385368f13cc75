/* Outlook attention, for one element type and vector width; included by local_attention_body.h, whose parts it uses.
 *
 * A target pixel j takes, from each of the K^2 centres whose window holds it, a softmax over the K^2 sources of that
 * window. No logit is used by two pixels, so a row of targets reads each of its logits once: lines of them, shifted so
 * that they lie under their targets, become one weight for each of the (2K - 1)^2 offsets between target and source,
 * and what is left is a weighted sum as of local attention. The backward pass makes the weights again, writes the
 * gradients of the logits where these were read, and gathers those of the values from a ring of rows of weights.
 *
 * In `arguments`: window is 2K - 1, with border ZERO and stride 1; width is 0; v and out are the maps; q is the logits,
 * contiguous (batch, heads, K^2 targets, K^2 sources, rows, columns), grad_q their gradient; k has no part.
 */
typedef struct {
    int64_t side, sources; /* K, K^2 */
    int64_t pitch;         /* of a line of logits */
    REAL *lines;           /* [target][source][column]: logits, then their gradients */
    REAL *valid;           /* [target column][column]: 1 where the centre is on the map */
    VEC *shares;           /* [target][source]: the softmax of one vector of targets */
    int64_t *at;           /* [target][source]: the offset that this is */
} NAME(overlap);
#define OVERLAP NAME(overlap)

/* Where the source of a window lies, seen from a target of it, both counted row by row. */
INLINE int64_t NAME(offset)(int64_t side, int64_t target, int64_t source) {
    const int64_t down = source / side - target / side, right = source % side - target % side;
    return (down + side - 1) * (2 * side - 1) + right + side - 1;
}

/* Lays out scratch memory from `base`; with base NULL it only counts. Returns the elements needed. */
TARGET static int64_t NAME(find_overlap)(OVERLAP *o, REAL *base, const arguments *a, const LAYOUT *l) {
    const int64_t side = (a->window[0] + 1) / 2, sources = side * side, logits = sources * sources;
    const int64_t index = round_up(logits * (int64_t)sizeof(int64_t), VECTOR_BYTES) / (int64_t)sizeof(REAL);
    o->side = side, o->sources = sources, o->pitch = l->lanes;
    if (base) {
        o->shares = (VEC *)base;
        o->at = (int64_t *)(base + logits * LANES);
        o->lines = base + logits * LANES + index;
        o->valid = o->lines + logits * o->pitch;
        for (int64_t i = 0; i < logits; i++) o->at[i] = NAME(offset)(side, i / sources, i % sources);
        for (int64_t t = 0; t < side; t++) {
            const int64_t shift = (t - side / 2) * a->dilation[1];
            for (int64_t x = 0; x < a->query_columns; x++)
                o->valid[t * o->pitch + x] = x >= shift && x - shift < a->query_columns;
        }
    }
    return round_up(logits * (LANES + o->pitch) + index + side * o->pitch, LANES);
}

/* The centre row of a row of targets `row` of the window; whether it is on the map. */
INLINE int NAME(centre_row)(int64_t *centre, const arguments *a, const OVERLAP *o, int64_t y, int64_t row) {
    *centre = y - (row - o->side / 2) * a->dilation[0];
    return *centre >= 0 && *centre < a->query_rows;
}

/* Columns [*begin, *end) of targets whose centre, `*shift` before them, is on the map. */
INLINE void NAME(centre_columns)(int64_t *begin, int64_t *end, int64_t *shift, const arguments *a, const OVERLAP *o,
                                 int64_t column) {
    *shift = (column - o->side / 2) * a->dilation[1];
    *begin = least(most(0, *shift), a->query_columns);
    *end = most(*begin, least(a->query_columns, a->query_columns + *shift));
}

/* The logits of all targets of row y, each under its target. */
INLINE void NAME(read_logits)(const OVERLAP *o, const arguments *a, const REAL *logits, int64_t y) {
    const int64_t plane = a->query_rows * a->query_columns;
    for (int64_t row = 0; row < o->side; row++) {
        int64_t centre, begin, end, shift;
        if (!NAME(centre_row)(&centre, a, o, y, row)) continue;
        for (int64_t column = 0; column < o->side; column++) {
            const int64_t first = (row * o->side + column) * o->sources;
            NAME(centre_columns)(&begin, &end, &shift, a, o, column);
            for (int64_t s = first; s < first + o->sources; s++) {
                REAL *line = o->lines + s * o->pitch;
                memset(line, 0, (size_t)o->pitch * sizeof(REAL)); /* where no centre is: finite, and weighed with 0 */
                if (begin >= end) continue;
                memcpy(line + begin, logits + s * plane + centre * a->query_columns + begin - shift,
                       (size_t)(end - begin) * sizeof(REAL));
            }
        }
    }
}

/* The shares of one vector of targets at column x of row y, and their sums by offset. */
INLINE void NAME(weigh)(VEC *weights, const OVERLAP *o, const arguments *a, int64_t y, int64_t x, const int64_t side) {
    const int64_t sources = side * side;
    for (int64_t t = 0; t < (2 * side - 1) * (2 * side - 1); t++) weights[t] = (VEC){0};
    for (int64_t target = 0; target < sources; target++) {
        int64_t centre;
        if (!NAME(centre_row)(&centre, a, o, y, target / side)) continue;
        VEC *share = o->shares + target * sources;
        const REAL *line = o->lines + target * sources * o->pitch + x;
        const int64_t *at = o->at + target * sources;
        VEC top = LOAD(line), sum = {0};
        for (int64_t s = 1; s < sources; s++) top = NAME(larger)(LOAD(line + s * o->pitch), top);
        for (int64_t s = 0; s < sources; s++) {
            share[s] = NAME(exponential)(LOAD(line + s * o->pitch) - top);
            sum += share[s];
        }
        const VEC factor = LOAD(o->valid + target % side * o->pitch + x) / sum;
        for (int64_t s = 0; s < sources; s++) {
            share[s] *= factor;
            weights[at[s]] += share[s];
        }
    }
}

INLINE void NAME(weights_at)(VEC *weights, const OVERLAP *o, const arguments *a, int64_t y, int64_t x) {
    if (o->side == 3) NAME(weigh)(weights, o, a, y, x, 3);
    else NAME(weigh)(weights, o, a, y, x, o->side);
}

INLINE const REAL *NAME(logits_of)(const void *from, const OVERLAP *o, const arguments *a, int64_t task) {
    return (const REAL *)from + task * o->sources * o->sources * a->query_rows * a->query_columns;
}

/* ---- forward ---- */

TARGET static void NAME(outlook_rows)(const arguments *a, const LAYOUT *l, const OVERLAP *o, REAL *scratch,
                                      int64_t task, int64_t begin, int64_t end, int64_t plane) {
    const int64_t image = task / a->heads, head = task % a->heads;
    VEC *weights = (VEC *)scratch;
    REAL *values = scratch + l->taps * LANES, *out = values + l->value_width * plane;
    NAME(read_keys)(values, plane, NAME(of_head)(a->v, &a->v_at, image, head), &a->v_at, a, l, begin,
                    end - begin + a->dilation[0] * (a->window[0] - 1), a->value_width);
    for (int64_t y = begin; y < end; y++) {
        NAME(read_logits)(o, a, NAME(logits_of)(a->q, o, a, task), y);
        for (int64_t x = 0; x < l->lanes; x += LANES) {
            NAME(weights_at)(weights, o, a, y, x);
            NAME(all_means)(out + x, l->lanes, weights, (VEC){0} + (REAL)1.0, values + (y - begin) * l->row + x, plane,
                            l, l->value_width);
        }
        NAME(write_row)((REAL *)NAME(of_head)(a->out, &a->out_at, image, head) + y * a->out_at.row, out, l->lanes,
                        a->out_at.column, a->out_at.channel, a->query_columns, a->value_width);
    }
}

TARGET static int NAME(outlook_forward)(const arguments *a) {
    LAYOUT l;
    int status = NAME(find_layout)(&l, a);
    if (status == OK) {
        OVERLAP o;
        const int64_t reach = a->dilation[0] * (a->window[0] - 1), heads = a->batch * a->heads;
        /* Rows of a task: values that stay in the second-level cache, and work for every thread. */
        int64_t rows = most(262144 / (l.value_width * l.row * (int64_t)sizeof(REAL)) - reach, 2 * reach) + 1;
        const int64_t wanted = (2 * a->threads + heads - 1) / heads;
        if (a->threads > 1) rows = least(rows, most((a->query_rows + wanted - 1) / wanted, 1));
        rows = least(rows, a->query_rows);
        const int64_t tiles = (a->query_rows + rows - 1) / rows;
        rows = (a->query_rows + tiles - 1) / tiles;
        const int64_t plane = (rows + reach) * l.row + 16;
        const int64_t own = NAME(find_overlap)(&o, NULL, a, &l);
        const int64_t size = own + l.taps * LANES + l.value_width * (plane + l.lanes);
#pragma omp parallel num_threads((int)a->threads) private(o)
        {
            const unsigned before = flush_small();
            REAL *scratch = zeros(size * (int64_t)sizeof(REAL));
            if (scratch) NAME(find_overlap)(&o, scratch, a, &l);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads * tiles; task++) {
                const int64_t begin = task % tiles * rows, end = least(begin + rows, a->query_rows);
                if (scratch && begin < end) NAME(outlook_rows)(a, &l, &o, scratch + own, task / tiles, begin, end, plane);
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

/* Gradients of the logits of row y's targets to where the logits are, zeros where such have no target on the map. */
INLINE void NAME(write_logits)(REAL *to, const OVERLAP *o, const arguments *a, int64_t y) {
    const int64_t width = a->query_columns, plane = a->query_rows * width;
    for (int64_t target = 0; target < o->sources; target++) {
        int64_t centre, begin, end, shift;
        if (!NAME(centre_row)(&centre, a, o, y, target / o->side)) continue;
        NAME(centre_columns)(&begin, &end, &shift, a, o, target % o->side);
        for (int64_t s = target * o->sources; s < (target + 1) * o->sources; s++) {
            REAL *row = to + s * plane + centre * width;
            if (begin >= end) {
                memset(row, 0, (size_t)width * sizeof(REAL));
                continue;
            }
            memset(row, 0, (size_t)(begin - shift) * sizeof(REAL));
            memcpy(row + begin - shift, o->lines + s * o->pitch + begin, (size_t)(end - begin) * sizeof(REAL));
            memset(row + end - shift, 0, (size_t)(width - end + shift) * sizeof(REAL));
        }
    }
}

/* Zeros for the logits of centre row y whose targets lie above or below the map. */
INLINE void NAME(clear_logits)(REAL *to, const OVERLAP *o, const arguments *a, int64_t y) {
    const int64_t width = a->query_columns, plane = a->query_rows * width, all = o->sources * o->side;
    for (int64_t row = 0; row < o->side; row++) {
        const int64_t target = y + (row - o->side / 2) * a->dilation[0];
        if (target >= 0 && target < a->query_rows) continue;
        for (int64_t s = row * all; s < (row + 1) * all; s++)
            memset(to + s * plane + y * width, 0, (size_t)width * sizeof(REAL));
    }
}

/* From the gradients h->g of the weights those of the logits of one vector of targets, into their lines. */
INLINE void NAME(unweigh)(const VEC *gradients, const OVERLAP *o, const arguments *a, int64_t y, int64_t x,
                          const int64_t side) {
    const int64_t sources = side * side;
    for (int64_t target = 0; target < sources; target++) {
        int64_t centre;
        if (!NAME(centre_row)(&centre, a, o, y, target / side)) continue;
        const VEC *share = o->shares + target * sources;
        const int64_t *at = o->at + target * sources;
        REAL *line = o->lines + target * sources * o->pitch + x;
        VEC mean = {0};
        for (int64_t s = 0; s < sources; s++) mean += share[s] * gradients[at[s]];
        /* A centre on the map has shares that sum to 1, so the mean is one of gradients; off it all of this is 0. */
        for (int64_t s = 0; s < sources; s++)
            STORE(line + s * o->pitch) = share[s] * (gradients[at[s]] - mean);
    }
}

/* The weights of row y into the ring, and the gradients of its logits. */
INLINE void NAME(outlook_backward_row)(const HEAD *h, const arguments *a, const LAYOUT *l, const OVERLAP *o,
                                       int64_t image, int64_t head, int64_t y) {
    const int64_t slot = y % h->slots, pitch = h->slot_pitch, task = image * a->heads + head;
    REAL *p = h->p + slot * l->taps * pitch + l->shift, *grad = h->grad + slot * l->value_width * pitch + l->shift;
    NAME(read_row)(grad, pitch, NAME(of_head)(a->grad, &a->grad_at, image, head) + y * a->grad_at.row,
                   a->grad_at.column, a->grad_at.channel, a->query_columns, a->value_width, (REAL)1.0);
    NAME(read_logits)(o, a, NAME(logits_of)(a->q, o, a, task), y);
    for (int64_t x = 0; x < l->lanes; x += LANES) {
        NAME(weights_at)(h->s, o, a, y, x);
        for (int64_t t = 0; t < l->taps; t++) STORE(p + t * pitch + x) = h->s[t];
        NAME(all_dots)(h->g, grad + x, pitch, h->values + y * l->row + x, h->plane, l, l->value_width, 1);
        if (o->side == 3) NAME(unweigh)(h->g, o, a, y, x, 3);
        else NAME(unweigh)(h->g, o, a, y, x, o->side);
    }
    REAL *to = (REAL *)NAME(logits_of)(a->grad_q, o, a, task);
    NAME(write_logits)(to, o, a, y);
    NAME(clear_logits)(to, o, a, y);
}

TARGET static void NAME(outlook_backward_head)(const arguments *a, const LAYOUT *l, const HEAD *h, const OVERLAP *o,
                                               int64_t image, int64_t head) {
    NAME(read_keys)(h->values, h->plane, NAME(of_head)(a->v, &a->v_at, image, head), &a->v_at, a, l, 0, l->y.extent,
                    a->value_width);
    memset(h->grad_values, 0, (size_t)(l->value_width * h->grad_plane) * sizeof(REAL));
    for (int64_t y = 0; y < a->query_rows; y++) {
        NAME(outlook_backward_row)(h, a, l, o, image, head, y);
        const int64_t done = y + 1 < a->query_rows ? y + 1 : l->y.extent;
        for (int64_t row = y; row < done; row++)
            NAME(gather_row)(h->grad_values, h->p, h->grad, l->value_width, h, a, l, row);
    }
    NAME(write_keys)((REAL *)NAME(of_head)(a->grad_v, &a->grad_v_at, image, head), &a->grad_v_at, h->grad_values,
                     h->row, h, a, l, a->value_width);
}

TARGET static int NAME(outlook_backward)(const arguments *a) {
    LAYOUT l;
    int status = NAME(find_layout)(&l, a);
    if (status == OK) {
        const int64_t heads = a->batch * a->heads;
#pragma omp parallel num_threads((int)least(a->threads, heads))
        {
            const unsigned before = flush_small();
            HEAD h;
            OVERLAP o;
            const int64_t own = NAME(find_overlap)(&o, NULL, a, &l);
            REAL *scratch = zeros((own + NAME(find_head)(&h, NULL, a, &l)) * (int64_t)sizeof(REAL));
            if (scratch) {
                NAME(find_overlap)(&o, scratch, a, &l);
                NAME(find_head)(&h, scratch + own, a, &l);
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads; task++)
                if (scratch) NAME(outlook_backward_head)(a, &l, &h, &o, task / a->heads, task % a->heads);
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

#undef OVERLAP
