/* One frame's evidence in vectors of LANES cells. Included by _evidence.c once per instruction
 * set, which defines LANES, ON (the functions' attributes), NAME(x), and the vector vocabulary
 * V, M, I (floats, a mask over them, integers) with the operations used below.
 *
 * Three passes, each from the first row to the last, so that what a row needs lies in the cache:
 *   1. counts come back from the overview; background, whole and rest (kept uncompressed in the
 *      places of the maps 3 and 1, excess in that of 0);
 *   2. the frame's own scatter;
 *   3. the maps, how many cells exceed the thresholds, and which cells stand out most.
 * A pass that needs rows ahead runs as many rows behind.
 */

/* Sums over cells for each map and threshold. */
typedef struct {
    V of[MAPS][THRESHOLDS];
} NAME(Found);

/* 1 / sqrt(x) of a normal x > 0, to some units in the last place: a step of Newton's. */
static inline ON V NAME(inverse_root)(V x)
{
    V guess = GUESS_INVERSE_ROOT(x);
    return MUL(guess, LESS(SET(1.5f), MUL(MUL(SET(0.5f), x), guess), guess));
}

/* 1 / x of a normal x > 0, the same way. */
static inline ON V NAME(inverse)(V x)
{
    V guess = GUESS_INVERSE(x);
    return MUL(guess, LESS(SET(2.0f), x, guess));
}

/* The e of c = e / sqrt(1 + |e|). */
static inline ON V NAME(expanded)(V c)
{
    V square = MUL(c, c);
    V under = MUL(square, ADD(square, SET(4.0f)));
    return WITH_SIGN(MUL(SET(0.5f), ADD(square, ROOT(under))), c);
}

static inline ON V NAME(compressed)(V e)
{
    return MUL(e, NAME(inverse_root)(ADD(SET(1.0f), ABS(e))));
}

static inline ON V NAME(clamped)(V x)
{
    return MIN(MAX(x, SET(-3.0f)), SET(6.0f));
}

/* Sum of nine rows, cell by cell. */
static ON void NAME(down)(const float *const *rows, float *restrict out, Py_ssize_t width)
{
    for (Py_ssize_t x = 0; x < width; x += LANES) {
        V a = ADD(ADD(LOAD(rows[0] + x), LOAD(rows[1] + x)),
                  ADD(LOAD(rows[2] + x), LOAD(rows[3] + x)));
        V b = ADD(ADD(LOAD(rows[4] + x), LOAD(rows[5] + x)),
                  ADD(LOAD(rows[6] + x), LOAD(rows[7] + x)));
        STORE(out + x, ADD(ADD(a, b), LOAD(rows[8] + x)));
    }
}

/* Sum of nine neighbours of a padded row around cell x. */
static inline ON V NAME(across)(const float *row)
{
    V a = ADD(ADD(LOAD(row - 4), LOAD(row - 3)), ADD(LOAD(row - 2), LOAD(row - 1)));
    V b = ADD(ADD(LOAD(row + 0), LOAD(row + 1)), ADD(LOAD(row + 2), LOAD(row + 3)));
    return ADD(ADD(a, b), LOAD(row + 4));
}

/* Sum of seventeen neighbours of a padded row, for every cell. */
static ON void NAME(across_far)(const int32_t *row, int32_t *restrict fours,
                                int32_t *restrict out, Py_ssize_t width)
{
    for (Py_ssize_t x = 0; x < width + 16; x += LANES) {
        const int32_t *at = row - 8 + x;
        ISTORE(fours + x, IADD(IADD(ILOAD(at), ILOAD(at + 1)), IADD(ILOAD(at + 2), ILOAD(at + 3))));
    }
    for (Py_ssize_t x = 0; x < width; x += LANES) {
        const int32_t *at = fours + x;
        I a = IADD(IADD(ILOAD(at), ILOAD(at + 4)), IADD(ILOAD(at + 8), ILOAD(at + 12)));
        ISTORE(out + x, IADD(a, ILOAD(row + x + 8)));
    }
}

/* Counts of row y of the overview: excess, the cell's sum without and with its brightest pixel. */
static ON void NAME(opened)(const Frame *f, Py_ssize_t y, Sums *sums)
{
    const float *maximum = input(f, 0, y), *mean = input(f, 1, y), *share = input(f, 2, y);
    float *excess = plane(f, 0, y), *dimmer = plane(f, 1, y), *total = plane(f, 3, y);
    float *level = plane(f, MAPS, y);
    V cells = SET(0.0f), bright = SET(0.0f), middle = SET(0.0f);
    const V c = SET(0.375f), none = SET(0.0f), one = SET(1.0f), half = SET(0.5f);
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V part = LOAD(share + x), brightness = LOAD(mean + x);
        M inside = ABOVE(part, none);
        V e = NAME(expanded)(LOAD(maximum + x)), u = NAME(expanded)(brightness);
        V others = MAX(SUB(MUL(part, SET(f->pixels)), one), none);
        V less = MUL(half, u), top = MUL(half, ADD(ADD(e, SET(f->chance)), u));
        V rest = KEEP(inside, MUL(MAX(SUB(MUL(less, less), c), none), others));
        brightness = KEEP(inside, brightness);
        STORE(excess + x, e);
        STORE(dimmer + x, rest);
        STORE(total + x, ADD(rest, KEEP(inside, MAX(SUB(MUL(top, top), c), none))));
        STORE(level + x, brightness);
        cells = ADD(cells, KEEP(inside, one));
        bright = ADD(bright, brightness);
        middle = ADD(middle, KEEP(inside, NAME(clamped)(e)));
    }
    sums->cells += NAME(sum)(cells);
    sums->brightness += NAME(sum)(bright);
    sums->middle[0] += NAME(sum)(middle);
}

/* Row y without what stands out, so that a spot does not hide its neighbour or itself. */
static ON void NAME(ordinary)(const Frame *f, Py_ssize_t y, Rows *rows)
{
    const float *near[9];
    for (int i = 0; i < 9; i++) near[i] = input_or_none(f, rows, 2, y + i - 4);
    NAME(down)(near, rows->column, f->width);
    for (int i = 0; i < 9; i++) near[i] = plane_or_none(f, rows, 3, y + i - 4);
    NAME(down)(near, rows->column2, f->width);
    const float *share = input(f, 2, y), *total = plane(f, 3, y);
    float *restrict out = rows->ordinary[y % 9], *restrict inverse = rows->inverse[y % 5];
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V area = MAX(MUL(NAME(across)(rows->column + x), SET(f->pixels)), SET(1e-3f));
        V per = NAME(inverse)(area);
        V mean = MUL(MUL(NAME(across)(rows->column2 + x), per), MUL(LOAD(share + x), SET(f->pixels)));
        V most = ADD(mean, MUL(SET(3.0f), ROOT(ADD(mean, SET(0.5f)))));
        STORE(inverse + x, per);
        STORE(out + x, MIN(LOAD(total + x), most));
    }
}

/* By how many sigma the counts of row y exceed the background: whole and rest. */
static ON void NAME(exceeding)(const Frame *f, Py_ssize_t y, Rows *rows, Sums *sums)
{
    const float *near[9];
    for (int i = 0; i < 9; i++) {
        Py_ssize_t at = y + i - 4;
        near[i] = at < 0 || at >= f->height ? rows->none : rows->ordinary[at % 9];
    }
    NAME(down)(near, rows->column, f->width);
    const float *share = input(f, 2, y), *inverse = rows->inverse[y % 5];
    float *whole = plane(f, 3, y), *rest = plane(f, 1, y);
    const V c = SET(0.375f), none = SET(0.0f), one = SET(1.0f), two = SET(2.0f);
    V middle_rest = none, middle_whole = none;
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V part = LOAD(share + x), n = MUL(part, SET(f->pixels));
        M inside = ABOVE(part, none);
        V mean = MUL(NAME(across)(rows->column + x), LOAD(inverse + x));
        V expected = ROOT(ADD(MUL(mean, n), c));
        V expected_rest = ROOT(ADD(MUL(mean, MAX(SUB(n, one), none)), c));
        V w = KEEP(inside, MUL(two, SUB(ROOT(ADD(LOAD(whole + x), c)), expected)));
        V r = KEEP(inside, MUL(two, SUB(ROOT(ADD(LOAD(rest + x), c)), expected_rest)));
        STORE(whole + x, w);
        STORE(rest + x, r);
        middle_whole = ADD(middle_whole, KEEP(inside, NAME(clamped)(w)));
        middle_rest = ADD(middle_rest, KEEP(inside, NAME(clamped)(r)));
    }
    sums->middle[1] += NAME(sum)(middle_rest);
    sums->middle[2] += NAME(sum)(middle_whole);
}

/* Mean absolute deviations of row y of excess, rest and whole, cut at 6 and at 100 sigma. */
static ON void NAME(deviating)(const Frame *f, Py_ssize_t y, const float *middle, Sums *sums)
{
    static const int of[3] = {0, 1, 3};
    const float *share = input(f, 2, y);
    for (int i = 0; i < 3; i++) {
        const float *sigma = plane(f, of[i], y);
        V near = SET(0.0f), far = SET(0.0f);
        for (Py_ssize_t x = 0; x < f->width; x += LANES) {
            M inside = ABOVE(LOAD(share + x), SET(0.0f));
            V away = KEEP(inside, ABS(SUB(LOAD(sigma + x), SET(middle[i]))));
            near = ADD(near, MIN(away, SET(6.0f)));
            far = ADD(far, MIN(away, SET(100.0f)));
        }
        sums->near[i] += NAME(sum)(near);
        sums->far[i] += NAME(sum)(far);
    }
}

/* Moves the windows of the local noise on to row y, which leaves row y - 17 behind. */
static ON void NAME(slid)(const Frame *f, Py_ssize_t y, Rows *rows)
{
    int32_t *excess = rows->excess[y % 17], *rest = rows->rest[y % 17];
    const int there = y < f->height;
    const float *share = input_or_none(f, rows, 2, y);
    const float *left = input_or_none(f, rows, 2, y - 17);
    const float *sigma = there ? plane(f, 0, y) : rows->none;
    const float *sigma_rest = there ? plane(f, 1, y) : rows->none;
    const V none = SET(0.0f), one = SET(1.0f), most = SET(6.0f), unit = SET(FIXED);
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        M inside = ABOVE(LOAD(share + x), none);
        I more = TO_I(SUB(KEEP(inside, one), KEEP(ABOVE(LOAD(left + x), none), one)));
        I e = TO_I(KEEP(inside, MUL(MIN(ABS(LOAD(sigma + x)), most), unit)));
        I r = TO_I(KEEP(inside, MUL(MIN(ABS(LOAD(sigma_rest + x)), most), unit)));
        ISTORE(rows->sum_cells + x, IADD(ILOAD(rows->sum_cells + x), more));
        ISTORE(rows->sum_excess + x, IADD(ILOAD(rows->sum_excess + x), ISUB(e, ILOAD(excess + x))));
        ISTORE(rows->sum_rest + x, IADD(ILOAD(rows->sum_rest + x), ISUB(r, ILOAD(rest + x))));
        ISTORE(excess + x, e);
        ISTORE(rest + x, r);
    }
}

/* How far the cells of a map's row reach over each threshold, soft by half a unit. Few reach far,
 * so those that do are gathered first. */
static ON void NAME(counted)(const Frame *f, int map, Py_ssize_t y, Rows *rows, NAME(Found) *found)
{
    const float *row = plane(f, map, y);
    float *restrict far = rows->far;
    V *sums = found->of[map];
    const V none = SET(0.0f), step = SET(0.5f);
    const V low = SET(f->floors[0]), middle = SET(f->floors[1]), high = SET(f->floors[2]);
    V a = sums[0], b = sums[1];
    Py_ssize_t many = 0;
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V v = LOAD(row + x);
        a = ADD(a, MIN(MAX(SUB(v, low), none), step));
        b = ADD(b, MIN(MAX(SUB(v, middle), none), step));
        many += PACK(far + many, ABOVE(v, high), v);
    }
    sums[0] = a;
    sums[1] = b;
    STORE(far + many, high);
    for (Py_ssize_t x = 0; x < many; x += LANES) {
        V v = LOAD(far + x);
        for (int i = 2; i < THRESHOLDS; i++)
            sums[i] = ADD(sums[i], MIN(MAX(SUB(v, SET(f->floors[i])), none), step));
    }
}

/* Maps of row y that need no neighbours: 0 to 3 in the frame's own noise, 6 to 8 in local noise. */
static ON void NAME(alone)(const Frame *f, Py_ssize_t y, const float *middle, const float *scale,
                           Rows *rows, NAME(Found) *found)
{
    NAME(across_far)(rows->sum_cells, rows->fours, rows->near_cells, f->width);
    NAME(across_far)(rows->sum_excess, rows->fours, rows->near_excess, f->width);
    NAME(across_far)(rows->sum_rest, rows->fours, rows->near_rest, f->width);
    const float *share = input(f, 2, y);
    float *map[9];
    for (int i = 0; i < 9; i++) map[i] = plane(f, i, y);
    float *restrict own_whole = rows->whole[y % 5], *restrict local_rest = rows->local[y % 5];
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        M inside = ABOVE(LOAD(share + x), SET(0.0f));
        V e = LOAD(map[0] + x), r = LOAD(map[1] + x), w = LOAD(map[3] + x);
        V cells = MAX(TO_V(ILOAD(rows->near_cells + x)), SET(1.0f));
        V least = MUL(cells, SET(0.25f)), deviation = SET((float)(1.0 / (FIXED * 0.8)));
        V near_e = MAX(MUL(TO_V(ILOAD(rows->near_excess + x)), deviation), least);
        V near_r = MAX(MUL(TO_V(ILOAD(rows->near_rest + x)), deviation), least);
        V local_e = KEEP(inside, MUL(MUL(e, cells), NAME(inverse)(near_e)));
        V local_r = KEEP(inside, MUL(MUL(r, cells), NAME(inverse)(near_r)));
        e = KEEP(inside, MUL(SUB(e, SET(middle[0])), SET(scale[0])));
        r = KEEP(inside, MUL(SUB(r, SET(middle[1])), SET(scale[1])));
        w = KEEP(inside, MUL(SUB(w, SET(middle[2])), SET(scale[2])));
        STORE(own_whole + x, w);
        STORE(local_rest + x, local_r);
        e = NAME(compressed)(e);
        r = NAME(compressed)(r);
        STORE(map[0] + x, e);
        STORE(map[1] + x, r);
        STORE(map[2] + x, MIN(e, r));
        STORE(map[3] + x, NAME(compressed)(w));
        e = NAME(compressed)(local_e);
        r = NAME(compressed)(local_r);
        STORE(map[6] + x, e);
        STORE(map[7] + x, r);
        STORE(map[8] + x, MIN(e, r));
    }
    for (int i = 0; i < 9; i++)
        if (i != 4 && i != 5) NAME(counted)(f, i, y, rows, found);
}

/* Row y of a map of blobs: over the better of two opposite neighbours, in the worst of four
 * directions, which is over the best of the eight neighbours. */
static ON void NAME(blob)(const Frame *f, Py_ssize_t y, float *const *of, Rows *rows,
                          int distance, int map, NAME(Found) *found)
{
    const float *above = y < distance ? rows->none : of[(y - distance) % 5];
    const float *below = y + distance >= f->height ? rows->none : of[(y + distance) % 5];
    const float *here = of[y % 5], *share = input(f, 2, y);
    float *restrict ends = rows->column, *restrict best = rows->column2;
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V both = MAX(LOAD(above + x), LOAD(below + x));
        STORE(ends + x, both);
        STORE(best + x, MAX(both, LOAD(here + x)));
    }
    float *restrict out = plane(f, map, y);
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V level = MAX(LOAD(best + x - distance), LOAD(best + x + distance));
        V over = SUB(LOAD(here + x), MAX(level, LOAD(ends + x)));
        M inside = ABOVE(LOAD(share + x), SET(0.0f));
        STORE(out + x, KEEP(inside, NAME(compressed)(over)));
    }
    NAME(counted)(f, map, y, rows, found);
}

/* Keeps the cells of row y that stand out by more than the list's floor. */
static ON void NAME(listed)(const Frame *f, Py_ssize_t y, List *list)
{
    const float *a = plane(f, 0, y), *b = plane(f, 4, y), *c = plane(f, 6, y), *d = plane(f, 9, y);
    for (Py_ssize_t x = 0; x < f->width; x += LANES) {
        V peak = MAX(MAX(LOAD(a + x), LOAD(b + x)), MAX(LOAD(c + x), LOAD(d + x)));
        unsigned strong = BITS(ABOVE(peak, SET(list->floor)));
        if (!strong) continue;
        float peaks[LANES];
        STORE(peaks, peak);
        for (; strong; strong &= strong - 1) {
            int i = __builtin_ctz(strong);
            if (peaks[i] > list->floor) keep(list, peaks[i], (uint32_t)(y * f->columns + x + i));
        }
    }
}

static ON void NAME(evidence)(const Frame *f, Rows *rows, float *counts, List *list)
{
    const Py_ssize_t height = f->height;
    Sums sums = {0};
    for (Py_ssize_t y = 0; y < height + 8; y++) {
        if (y < height) NAME(opened)(f, y, &sums);
        if (y >= 4 && y < height + 4) NAME(ordinary)(f, y - 4, rows);
        if (y >= 8) NAME(exceeding)(f, y - 8, rows, &sums);
    }
    const double cells = sums.cells > 1.0 ? sums.cells : 1.0;
    float middle[3], scale[3];
    for (int i = 0; i < 3; i++) {
        double mean = sums.middle[i] / cells;
        middle[i] = (float)(mean > 0.0 ? mean : 0.0);
    }
    for (Py_ssize_t y = 0; y < height; y++) NAME(deviating)(f, y, middle, &sums);
    float *context = counts + MAPS * THRESHOLDS;
    context[0] = (float)(sums.brightness / cells);
    context[1] = (float)log(sqrt((double)f->pixels));
    context[2] = (float)log(cells);
    for (int i = 0; i < 3; i++) {
        double scatter = sums.near[i] / cells / 0.8;
        scale[i] = (float)(1.0 / (scatter > 1.0 ? scatter : 1.0));
        context[3 + i] = (float)log(sums.far[i] / cells + 0.1);
    }

    NAME(Found) found;
    double above[MAPS * THRESHOLDS] = {0};
    memset(&found, 0, sizeof found);
    for (Py_ssize_t y = 0; y < height + 10; y++) {
        if (y < height + 8) NAME(slid)(f, y, rows);
        if (y >= 8 && y < height + 8) NAME(alone)(f, y - 8, middle, scale, rows, &found);
        if (y < 10) continue;
        for (int d = 1; d <= 2; d++) {
            NAME(blob)(f, y - 10, rows->whole, rows, d, 3 + d, &found);
            NAME(blob)(f, y - 10, rows->local, rows, d, 8 + d, &found);
        }
        NAME(listed)(f, y - 10, list);
        /* Single precision holds for some rows. */
        if (y % 16 == 0 || y == height + 9) {
            for (int i = 0; i < MAPS * THRESHOLDS; i++)
                above[i] += NAME(sum)(found.of[i / THRESHOLDS][i % THRESHOLDS]);
            memset(&found, 0, sizeof found);
        }
    }
    for (int i = 0; i < MAPS * THRESHOLDS; i++) counts[i] = (float)log1p(2.0 * above[i]);
}

#undef LANES
#undef ON
#undef V
#undef M
#undef I
#undef LOAD
#undef STORE
#undef SET
#undef ADD
#undef SUB
#undef MUL
#undef LESS
#undef MIN
#undef MAX
#undef GUESS_INVERSE
#undef ROOT
#undef GUESS_INVERSE_ROOT
#undef ABS
#undef WITH_SIGN
#undef ABOVE
#undef KEEP
#undef BITS
#undef PACK
#undef ILOAD
#undef ISTORE
#undef IADD
#undef ISUB
#undef TO_I
#undef TO_V
