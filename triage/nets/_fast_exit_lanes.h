/* The learned part of the fast exit in vectors of LANES numbers. Included by _fast_exit.c once per
 * instruction set, which defines LANES, AT_ONCE (candidates that pass together, as many as the
 * registers hold), ON (the functions' attributes), NAME(x), FMA(a, b, c) = a b + c, and the vectors
 * V of floats and I of integers of the same width.
 */

static inline ON V NAME(load)(const float *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline ON V NAME(all)(float a)
{
    return a - (V){0};
}

/* A NaN in ``no`` is not below, and passes. */
static inline ON V NAME(chosen)(I mask, V yes, V no)
{
    return (V)((mask & (I)yes) | (~mask & (I)no));
}

/* 1 / (1 + exp(-x)): exp(y) = 2^n exp(r) with |r| <= ln 2 / 2 and the Taylor polynomial of degree
 * 7, whose rest is below half a unit in the last place. */
static inline ON V NAME(sigmoid)(V x)
{
    const V low = NAME(all)(-87.0f), high = NAME(all)(87.0f);
    V y = NAME(chosen)(-x < low, low, -x);
    y = NAME(chosen)(y > high, high, y);
    /* Added to 1.5 * 2^23, a number is rounded to an integer that stands in its last bits. */
    const V shift = NAME(all)(12582912.0f);
    const V shifted = FMA(y, NAME(all)(1.4426950408889634f), shift), n = shifted - shift;
    /* ln 2 in two parts: the first has few bits, and n times it is exact. */
    V r = FMA(n, NAME(all)(-0.693359375f), y);
    r = FMA(n, NAME(all)(2.12194440e-4f), r);
    V p = FMA(NAME(all)(1.0f / 5040.0f), r, NAME(all)(1.0f / 720.0f));
    p = FMA(p, r, NAME(all)(1.0f / 120.0f));
    p = FMA(p, r, NAME(all)(1.0f / 24.0f));
    p = FMA(p, r, NAME(all)(1.0f / 6.0f));
    p = FMA(p, r, NAME(all)(0.5f));
    p = FMA(p, r, NAME(all)(1.0f));
    p = FMA(p, r, NAME(all)(1.0f));
    const I power = (I)shifted << 23;
    return NAME(all)(1.0f) / FMA(p, (V)(power + 0x3f800000), NAME(all)(1.0f));
}

/* Sums over the candidates of one member's looks, and of their cubes: (2, PADDED). */
static ON void NAME(seen)(const Member *member, const float *candidates, const float *weights,
                          Py_ssize_t number, float *sums)
{
    enum { ACROSS = HIDDEN / LANES, DOWN = PADDED / LANES };
    V total[DOWN], sure[DOWN];
    for (int v = 0; v < DOWN; v++) total[v] = sure[v] = NAME(all)(0.0f);
    for (Py_ssize_t k = 0; k < number; k += AT_ONCE) {
        const float *x = candidates + k * WIDTH;
        V hidden[AT_ONCE][ACROSS], yes[AT_ONCE][DOWN];
        float rectified[AT_ONCE][HIDDEN];
#pragma GCC unroll 8
        for (int c = 0; c < AT_ONCE; c++)
#pragma GCC unroll 8
            for (int v = 0; v < ACROSS; v++) hidden[c][v] = NAME(load)(member->base + v * LANES);
        for (int j = 0; j < WIDTH; j++) {
            V w[ACROSS];
#pragma GCC unroll 8
            for (int v = 0; v < ACROSS; v++)
                w[v] = NAME(load)(member->first + j * HIDDEN + v * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < AT_ONCE; c++) {
                const V one = NAME(all)(x[c * WIDTH + j]);
#pragma GCC unroll 8
                for (int v = 0; v < ACROSS; v++) hidden[c][v] = FMA(one, w[v], hidden[c][v]);
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < AT_ONCE; c++)
#pragma GCC unroll 8
            for (int v = 0; v < ACROSS; v++) {
                const V zero = NAME(all)(0.0f), h = hidden[c][v];
                const V positive = NAME(chosen)(h < zero, zero, h);
                memcpy(rectified[c] + v * LANES, &positive, sizeof positive);
            }
#pragma GCC unroll 8
        for (int c = 0; c < AT_ONCE; c++)
#pragma GCC unroll 8
            for (int v = 0; v < DOWN; v++) yes[c][v] = NAME(load)(member->second_bias + v * LANES);
        for (int h = 0; h < HIDDEN; h++) {
            V w[DOWN];
#pragma GCC unroll 8
            for (int v = 0; v < DOWN; v++)
                w[v] = NAME(load)(member->second + h * PADDED + v * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < AT_ONCE; c++) {
                const V one = NAME(all)(rectified[c][h]);
#pragma GCC unroll 8
                for (int v = 0; v < DOWN; v++) yes[c][v] = FMA(one, w[v], yes[c][v]);
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < AT_ONCE; c++)
#pragma GCC unroll 8
            for (int v = 0; v < DOWN; v++) {
                const V one = NAME(sigmoid)(yes[c][v]) * weights[k + c];
                total[v] += one;
                sure[v] = FMA(one * one, one, sure[v]);
            }
    }
    memcpy(sums, total, sizeof total);
    memcpy(sums + PADDED, sure, sizeof sure);
}

/* out[o] = bias[o] + sum of x[i] weights[i, o], for so many vectors of outputs. */
static inline __attribute__((always_inline)) ON void NAME(dense_of)(
    const float *x, int inputs, const float *weights, const float *bias, int outputs, float *out,
    const int vectors)
{
    V sums[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sums[v] = NAME(load)(bias + v * LANES);
    for (int i = 0; i < inputs; i++, weights += outputs) {
        const V one = NAME(all)(x[i]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[v] = FMA(one, NAME(load)(weights + v * LANES), sums[v]);
    }
    memcpy(out, sums, sizeof(V) * (size_t)vectors);
}

/* The same for outputs that are a multiple of 16. */
static ON void NAME(dense)(const float *x, int inputs, const float *weights, const float *bias,
                           int outputs, float *out)
{
    int o = 0;
    for (; o + 4 * LANES <= outputs; o += 4 * LANES)
        NAME(dense_of)(x, inputs, weights + o, bias + o, outputs, out + o, 4);
    for (; o + 2 * LANES <= outputs; o += 2 * LANES)
        NAME(dense_of)(x, inputs, weights + o, bias + o, outputs, out + o, 2);
    for (; o < outputs; o += LANES)
        NAME(dense_of)(x, inputs, weights + o, bias + o, outputs, out + o, 1);
}

static ON void NAME(rectify)(float *x, int size)
{
    for (int i = 0; i < size; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
}

/* Five taps, rectified: out[o, p] = bias[o] + sum over c, t of x[c, p + taps[t]] weights[c, t, o].
 * Behind the last place stands rubbish up to the end of a vector. */
static ON void NAME(convolve)(const float *x, int channels, int row, const int *taps, int places,
                              const float *weights, const float *bias, int outputs, float *out,
                              int out_row)
{
    for (int p = 0; p < places; p += 2 * LANES)
        for (int o = 0; o < outputs; o += 4) {
            V sums[4][2];
#pragma GCC unroll 8
            for (int i = 0; i < 4; i++) sums[i][0] = sums[i][1] = NAME(all)(bias[o + i]);
            const float *w = weights + o;
            for (int c = 0; c < channels; c++)
                for (int t = 0; t < TAPS; t++, w += outputs) {
                    const float *at = x + c * row + taps[t] + p;
                    const V near = NAME(load)(at), far = NAME(load)(at + LANES);
#pragma GCC unroll 8
                    for (int i = 0; i < 4; i++) {
                        const V one = NAME(all)(w[i]);
                        sums[i][0] = FMA(one, near, sums[i][0]);
                        sums[i][1] = FMA(one, far, sums[i][1]);
                    }
                }
#pragma GCC unroll 8
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 8
                for (int v = 0; v < 2; v++) {
                    const V zero = NAME(all)(0.0f);
                    const V positive = NAME(chosen)(sums[i][v] < zero, zero, sums[i][v]);
                    memcpy(out + (o + i) * out_row + p + v * LANES, &positive, sizeof positive);
                }
        }
}

/* Rows of places as rows of the even ones and, HALF behind, of the odd ones, zeros around both. */
static ON void NAME(halve)(const float *x, int rows, int row, int places, float *out)
{
    const int half = places / 2;
    for (int c = 0; c < rows; c++) {
        float *even = out + c * 2 * HALF + EDGE, *odd = even + HALF;
        for (int i = 0; i < half; i++) {
            even[i] = x[c * row + 2 * i];
            odd[i] = x[c * row + 2 * i + 1];
        }
        even[-1] = odd[-1] = 0.0f;
        memset(even + half, 0, sizeof(float) * BEHIND);
        memset(odd + half, 0, sizeof(float) * BEHIND);
    }
}

/* The radial view (5, sectors, bins) against the bins around: (6, bins) into rows of ROW. */
static ON void NAME(against_continuum)(const float *radial, int sectors, int bins, float *x)
{
    const float *level = radial, *share = level + sectors * bins, *lost = share + sectors * bins;
    float sectors_seen[BINS], total[BINS], excluded[BINS], brightest[BINS], square[BINS];
    float ratio[SECTORS][BINS], valid[SECTORS][BINS], smooth[BINS];
    /* Sums from the first bin on, by the bin behind, from REACH bins before the first. */
    double levels[BINS + 2 * REACH + 1] = {0.0}, near[BINS + 2 * REACH + 1] = {0.0};
    for (int i = 0; i < bins; i++) sectors_seen[i] = total[i] = excluded[i] = square[i] = 0.0f;
    for (int s = 0; s < sectors; s++) {
        float *r = ratio[s], *v = valid[s];
        for (int i = 0; i < bins; i++) {
            v[i] = share[s * bins + i] > 0.3f ? 1.0f : 0.0f;
            r[i] = logf(level[s * bins + i] + 1e-3f) * v[i];
        }
        for (int i = 0; i < bins; i++) {
            levels[REACH + 1 + i] = levels[REACH + i] + (double)r[i];
            near[REACH + 1 + i] = near[REACH + i] + (double)v[i];
        }
        for (int i = 1; i <= REACH; i++) {
            levels[REACH + bins + i] = levels[REACH + bins];
            near[REACH + bins + i] = near[REACH + bins];
        }
        for (int i = 0; i < bins; i++) {
            const double sum = levels[i + 2 * REACH + 1] - levels[i];
            const double there = near[i + 2 * REACH + 1] - near[i];
            const double least = 1e-3 * (2 * REACH + 1);
            smooth[i] = (float)(sum / (there > least ? there : least));
        }
        for (int i = 0; i < bins; i++) {
            float over = r[i] - smooth[i] * v[i];
            over = over < -2.0f ? -2.0f : over;
            over = over > 3.0f ? 3.0f : over;
            r[i] = over;
            sectors_seen[i] += v[i];
            total[i] += over;
            excluded[i] += lost[s * bins + i] * v[i];
            brightest[i] = s && !(over > brightest[i]) ? brightest[i] : over;
        }
    }
    float mean[BINS], seen[BINS];
    for (int i = 0; i < bins; i++) {
        seen[i] = sectors_seen[i] > 1.0f ? sectors_seen[i] : 1.0f;
        mean[i] = total[i] / seen[i];
    }
    for (int s = 0; s < sectors; s++)
        for (int i = 0; i < bins; i++) {
            const float away = (ratio[s][i] - mean[i]) * valid[s][i];
            square[i] += away * away;
        }
    for (int i = 0; i < bins; i++) {
        const float spread = sqrtf(square[i] / seen[i] + 1e-6f);
        const float agreed = mean[i] * sqrtf(seen[i]) / spread;
        x[i] = 4.0f * mean[i];
        x[ROW + i] = 4.0f * spread;
        x[2 * ROW + i] = sectors_seen[i] / (float)sectors;
        x[3 * ROW + i] = 4.0f * excluded[i] / seen[i];
        x[4 * ROW + i] = 2.0f * brightest[i];
        x[5 * ROW + i] = agreed / sqrtf(1.0f + fabsf(agreed));
    }
}

/* By how much a core of bins exceeds the parabola through the bins to both sides of it, in one
 * sector: excess, 1 over its variance and mean of the window, (bins) each. pixels and counts have
 * zeros around. Behind the last bin stands rubbish up to the end of a vector. */
static inline __attribute__((always_inline)) ON void NAME(over_parabola_of)(
    const float *pixels, const float *counts, int bins, float *excess, float *weight, float *level,
    const int core, const int reach)
{
    const V zero = NAME(all)(0.0f), one = NAME(all)(1.0f), tiny = NAME(all)(1e-9f);
    const V least = NAME(all)(LEAST_DETERMINANT), smallest = NAME(all)(1e-20f);
    for (int i = 0; i < bins; i += LANES) {
        V inside = zero, c1 = zero, c2 = zero, core_counts = zero;
        V beside = zero, a1 = zero, a2 = zero, a3 = zero, a4 = zero;
        V y0 = zero, y1 = zero, y2 = zero;
        /* The mask of the core is the same for every bin, so there are two loops. */
#pragma GCC unroll 7
        for (int j = -core; j <= core; j++) {
            const float place = (float)j / (float)reach;
            const V n = NAME(load)(pixels + i + j), x = NAME(all)(place);
            inside += n;
            c1 = FMA(n, x, c1);
            c2 = FMA(n, NAME(all)(place * place), c2);
            core_counts += NAME(load)(counts + i + j);
        }
#pragma GCC unroll 17
        for (int j = -reach; j <= reach; j++) {
            if (j >= -core && j <= core) continue;
            const float place = (float)j / (float)reach, square = place * place;
            const V n = NAME(load)(pixels + i + j), of = NAME(load)(counts + i + j);
            const V x = NAME(all)(place), xx = NAME(all)(square);
            beside += n;
            a1 = FMA(n, x, a1);
            a2 = FMA(n, xx, a2);
            a3 = FMA(n, NAME(all)(square * place), a3);
            a4 = FMA(n, NAME(all)(square * square), a4);
            y0 += of;
            y1 = FMA(of, x, y1);
            y2 = FMA(of, xx, y2);
        }
        const V mean = (y0 + core_counts + one) / (beside + inside + one);
        const I unseen = (beside <= zero) | (inside <= zero);
        beside = NAME(chosen)(beside < tiny, tiny, beside);
        inside = NAME(chosen)(inside < tiny, tiny, inside);
        const V by_beside = one / beside, by_inside = one / inside;
        a1 *= by_beside, a2 *= by_beside, a3 *= by_beside, a4 *= by_beside;
        c1 *= by_inside, c2 *= by_inside;
        /* The adjugate of the matrix ((1, a1, a2), (a1, a2, a3), (a2, a3, a4)). */
        const V m00 = a2 * a4 - a3 * a3, m01 = a2 * a3 - a1 * a4, m02 = a1 * a3 - a2 * a2;
        const V m11 = a4 - a2 * a2, m12 = a1 * a2 - a3, m22 = a2 - a1 * a1;
        V determinant = m00 + a1 * m01 + a2 * m02;
        const I made_up = unseen | (determinant <= least);
        determinant = NAME(chosen)(made_up, one, determinant);
        const V by_determinant = one / determinant;
        const V g0 = (m00 + m01 * c1 + m02 * c2) * by_determinant;
        const V g1 = (m01 + m11 * c1 + m12 * c2) * by_determinant;
        const V g2 = (m02 + m12 * c1 + m22 * c2) * by_determinant;
        const V over = core_counts * by_inside - (g0 * y0 + g1 * y1 + g2 * y2) * by_beside;
        V leverage = (g0 + g1 * c1 + g2 * c2) * by_beside;
        leverage = NAME(chosen)(leverage < zero, zero, leverage);
        V variance = mean * (by_inside + leverage);
        variance = NAME(chosen)(variance < smallest, smallest, variance);
        const V found[3] = {
            NAME(chosen)(made_up, zero, over),
            NAME(chosen)(made_up, zero, one / variance),
            NAME(chosen)(made_up, zero, mean),
        };
        memcpy(excess + i, &found[0], sizeof(V));
        memcpy(weight + i, &found[1], sizeof(V));
        memcpy(level + i, &found[2], sizeof(V));
    }
}

static ON void NAME(over_parabola)(const float *pixels, const float *counts, int bins, int width,
                                   float *excess, float *weight, float *level)
{
    if (width == 0)
        NAME(over_parabola_of)(pixels, counts, bins, excess, weight, level, 0, 4);
    else if (width == 1)
        NAME(over_parabola_of)(pixels, counts, bins, excess, weight, level, 1, 5);
    else
        NAME(over_parabola_of)(pixels, counts, bins, excess, weight, level, 3, 8);
}

/* One mean of the radial view, the plane `of`, against parabolas, in units of noise: (9, bins)
 * into rows of ROW. */
static ON void NAME(in_sigma)(const float *radial, int of, int sectors, int bins, float *x)
{
    const int size = sectors * bins;
    const float *mean = radial + of * size, *share = radial + size, *counted = radial + 3 * size;
    float pixels[SECTORS][ROW], counts[SECTORS][ROW];
    float excess[SECTORS][ROW], weight[SECTORS][ROW], level[ROW];
    float seen[BINS], weights[BINS], together[BINS], under[BINS], disagreement[BINS];
    float by_scatter = 1.0f, by_root = 1.0f;
    for (int s = 0; s < sectors; s++) {
        memset(pixels[s], 0, sizeof pixels[s]);
        memset(counts[s], 0, sizeof counts[s]);
        for (int i = 0; i < bins; i++) {
            const float n = share[s * bins + i] > 0.3f ? 1.0f : 0.0f;
            pixels[s][EDGE + i] = counted[s * bins + i] * n;
            counts[s][EDGE + i] = mean[s * bins + i] * pixels[s][EDGE + i];
        }
    }
    for (int width = 0; width < WIDTHS; width++, x += 3 * ROW) {
        for (int i = 0; i < bins; i++)
            seen[i] = weights[i] = together[i] = under[i] = disagreement[i] = 0.0f;
        for (int s = 0; s < sectors; s++) {
            NAME(over_parabola)(pixels[s] + EDGE, counts[s] + EDGE, bins, width, excess[s],
                                weight[s], level);
            for (int i = 0; i < bins; i++) {
                seen[i] += weight[s][i] > 0.0f ? 1.0f : 0.0f;
                weights[i] += weight[s][i];
                together[i] += weight[s][i] * excess[s][i];
                under[i] += weight[s][i] * level[i];
            }
        }
        for (int i = 0; i < bins; i++) weights[i] = weights[i] < 1e-20f ? 1e-20f : weights[i];
        for (int s = 0; s < sectors; s++)
            for (int i = 0; i < bins; i++) {
                const float away = excess[s][i] - together[i] / weights[i];
                disagreement[i] += weight[s][i] * away * away;
            }
        for (int i = 0; i < bins; i++) disagreement[i] /= seen[i] > 2.0f ? seen[i] - 1.0f : 1.0f;
        if (width == 0) {
            const float scatter = scatter_of(disagreement, seen, bins);
            by_scatter = 1.0f / scatter;
            by_root = 1.0f / sqrtf(scatter);
        }
        for (int i = 0; i < bins; i++) {
            const float sigma = together[i] / sqrtf(weights[i]) * by_root;
            float ratio = under[i] < 1e-20f ? 1e-20f : under[i];
            ratio = 4.0f * together[i] / ratio;
            ratio = ratio < -4.0f ? -4.0f : ratio;
            x[i] = SIGMA_SCALE * sigma / sqrtf(1.0f + fabsf(sigma));
            x[ROW + i] = log1pf(disagreement[i] * by_scatter);
            x[2 * ROW + i] = ratio > 8.0f ? 8.0f : ratio;
        }
    }
}

/* (RINGS) of the radial view. */
static ON void NAME(rings)(const float *radial, int sectors, int bins, const Rings *r, float *out)
{
    static const int every[TAPS] = {-2, -1, 0, 1, 2};
    static const int halved[TAPS] = {-1, HALF - 1, 0, HALF, 1};
    float x[SEEN * ROW] = {0}, wide[24 * ROW], halves[24 * 2 * HALF], last[12 * ROW];
    float flat[12 * BINS / 4];
    NAME(against_continuum)(radial, sectors, bins, x + EDGE);
    NAME(in_sigma)(radial, 0, sectors, bins, x + 6 * ROW + EDGE);
    NAME(in_sigma)(radial, 4, sectors, bins, x + (6 + 3 * WIDTHS) * ROW + EDGE);
    NAME(convolve)(x + EDGE, SEEN, ROW, every, bins, r->first, r->first_bias, 24, wide, ROW);
    NAME(halve)(wide, 24, ROW, bins, halves);
    NAME(convolve)(halves + EDGE, 24, 2 * HALF, halved, bins / 2, r->second, r->second_bias, 24,
                   wide, ROW);
    NAME(halve)(wide, 24, ROW, bins / 2, halves);
    NAME(convolve)(halves + EDGE, 24, 2 * HALF, halved, bins / 4, r->third, r->third_bias, 12,
                   last, ROW);
    for (int c = 0; c < 12; c++)
        memcpy(flat + c * (bins / 4), last + c * ROW, sizeof(float) * (size_t)(bins / 4));
    NAME(dense)(flat, 12 * (bins / 4), r->flat, r->flat_bias, RINGS, out);
    NAME(rectify)(out, RINGS);
}

/* One member's answer (PADDED) to what is known. */
static ON void NAME(answered)(const Answer *a, const float *x, float *out)
{
    float first[FIRST_LAYER], second[HIDDEN];
    NAME(dense)(x, a->inputs, a->first, a->first_bias, FIRST_LAYER, first);
    NAME(rectify)(first, FIRST_LAYER);
    NAME(dense)(first, FIRST_LAYER, a->second, a->second_bias, HIDDEN, second);
    NAME(rectify)(second, HIDDEN);
    NAME(dense)(second, HIDDEN, a->third, a->third_bias, PADDED, out);
}

#undef LANES
#undef AT_ONCE
#undef ON
#undef FMA
#undef V
#undef I
