/* What the members of a panel see in a frame's candidates, in vectors of LANES numbers. Included by
 * _looks.c once per instruction set, which defines LANES, AT_ONCE (candidates that pass together,
 * as many as the registers hold), ON (the functions' attributes), NAME(x), FMA(a, b, c) = a b + c,
 * and the vectors V of floats and I of integers of the same width.
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

#undef LANES
#undef AT_ONCE
#undef ON
#undef FMA
#undef V
#undef I
