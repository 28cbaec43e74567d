/* The kernels of _reduce.c, compiled once for each kind of processor that is told apart at run
 * time. The including file sets the instruction set and defines NAME(x), which gives every
 * function here a name of its own. A `vector` wider than the registers is taken apart by the
 * compiler.
 */

typedef uint64_t NAME(vector) __attribute__((vector_size(PIECE)));
#define vector NAME(vector)

#define EVERY_WORD(word) ((vector){0} + UINT64_C(word))
/* In every byte of a vector. */
#define EVERY(byte) ((vector){0} + UINT64_C(0x0101010101010101) * (byte))

typedef uint8_t NAME(sixteen) __attribute__((vector_size(16)));
#define sixteen NAME(sixteen)

ALWAYS sixteen NAME(load16)(const uint8_t *from) {
    sixteen piece;
    memcpy(&piece, from, sizeof piece);
    return piece;
}

ALWAYS void NAME(copy16)(uint8_t *to, const uint8_t *from) {
    const sixteen piece = NAME(load16)(from);
    memcpy(to, &piece, sizeof piece);
}

typedef uint64_t NAME(thirtytwo) __attribute__((vector_size(32)));

ALWAYS void NAME(copy32)(uint8_t *to, const uint8_t *from) {
    NAME(thirtytwo) piece;
    memcpy(&piece, from, sizeof piece);
    memcpy(to, &piece, sizeof piece);
}

#if PIECE == 64
ALWAYS void NAME(copy64)(uint8_t *to, const uint8_t *from) {
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
}
#endif

/* Sixteen bytes that begin at `from` and repeat with `period`, as it is below 16. */
ALWAYS sixteen NAME(repeated)(const uint8_t *from, size_t period) {
#ifdef __SSSE3__
    return (sixteen)_mm_shuffle_epi8((__m128i)NAME(load16)(from),
                                     (__m128i)NAME(load16)(PERIODIC[period]));
#else
    sixteen piece;
    for (size_t i = 0; i < 16; i++) piece[i] = from[PERIODIC[period][i]];
    return piece;
#endif
}

/* The rest of a length whose nibble was 15; 0 when the block ends in it. */
ALWAYS size_t NAME(long_length)(const uint8_t **at, const uint8_t *end) {
    const uint8_t *s = *at;
    size_t length = 15;
    unsigned more;
    do {
        if (s >= end) return 0;
        more = *s++;
        length += more;
    } while (more == 255);
    *at = s;
    return length;
}

/* The planes of a block that are not written, as they equal the last one before them, written. */
static void NAME(fill)(struct frame *f, uint8_t *planes, size_t bytes) {
    for (int p = f->same_from; p < f->same_to; p++)
        memcpy(planes + (size_t)p * bytes, planes + (size_t)(f->same_from - 1) * bytes, bytes);
    f->same_from = f->same_to = 0;
}

/* Copy a match of more than 16 bytes up to `stop`, and something behind it. */
ALWAYS void NAME(copy_match)(uint8_t *d, uint8_t *const stop, const uint8_t *from, size_t offset) {
#if PIECE == 64
    enum { FIRST = 4 };
    /* Most fit into the first pieces, which take no branch on their number. */
    if (offset >= 64) {
        for (int i = 0; i < FIRST; i++) NAME(copy64)(d + 64 * i, from + 64 * i);
        for (d += 64 * FIRST, from += 64 * FIRST; d < stop; d += 64, from += 64)
            NAME(copy64)(d, from);
        return;
    }
    /* As many whole periods as 64 bytes hold are stored at a time. */
    const __m512i piece = _mm512_permutexvar_epi8(
        _mm512_loadu_si512(PERIODIC64[offset]), _mm512_loadu_si512(from));
    const size_t step = STEP64[offset];
    for (int i = 0; i < FIRST; i++, d += step) _mm512_storeu_si512(d, piece);
    for (; d < stop; d += step) _mm512_storeu_si512(d, piece);
#else
    if (offset >= 32) {
        NAME(copy32)(d, from);
        NAME(copy32)(d + 32, from + 32);
        for (d += 64, from += 64; d < stop; d += 64, from += 64) {
            NAME(copy32)(d, from);
            NAME(copy32)(d + 32, from + 32);
        }
    } else if (offset >= 16) {
        for (; d < stop; d += 16, from += 16) NAME(copy16)(d, from);
    } else {
        /* As many whole periods as 16 bytes hold are stored at a time. */
        const sixteen piece = NAME(repeated)(from, offset);
        const size_t step = STEP[offset];
        memcpy(d, &piece, sizeof piece);
        memcpy(d + step, &piece, sizeof piece);
        memcpy(d + 2 * step, &piece, sizeof piece);
        memcpy(d + 3 * step, &piece, sizeof piece);
        for (d += 4 * step; d < stop; d += step) memcpy(d, &piece, sizeof piece);
    }
#endif
}

/* Decode the LZ4 block [s, end) to exactly out[0, size); 0, or a fault code.
 *
 * Copies go in whole pieces: up to READ_BEHIND bytes behind `end` are read and up to WRITE_BEHIND
 * behind the output written, all of which the caller provides; what counts is checked before.
 * The high planes of most blocks are alike, and come as one match with the plane before: they
 * are not written, but noted in f->same_from and f->same_to.
 */
static int NAME(lz4_block)(struct frame *f, const uint8_t *s, const uint8_t *end, uint8_t *out,
                           size_t size) {
    const size_t plane = size / (size_t)f->bits;
    uint8_t *d = out, *const full = out + size, *unwritten_to = out;
    f->same_from = f->same_to = 0;
    while (s < end) {
        const unsigned token = *s++;
        size_t length = token >> 4;
        if (length == 15 && !(length = NAME(long_length)(&s, end))) return CORRUPT_BLOCK;
        if (length > (size_t)(end - s) || length > (size_t)(full - d)) return CORRUPT_BLOCK;
        NAME(copy16)(d, s);
#if PIECE == 64
        /* Planes of noise come whole, and as much follows two or three blocks on. */
        if (length >= 256)
            for (size_t i = 0; i < length; i += 64) __builtin_prefetch(s + i + AHEAD);
        for (size_t i = 16; i < length; i += 64) NAME(copy64)(d + i, s + i);
#else
        for (size_t i = 16; i < length; i += 32) NAME(copy32)(d + i, s + i);
#endif
        s += length;
        d += length;
        /* The last sequence is literals alone. */
        if (s == end) return d == full ? 0 : SHORT_BLOCK;
        if (end - s < 2) return CORRUPT_BLOCK;
        const size_t offset = s[0] | (size_t)s[1] << 8;
        s += 2;
        /* An offset of 0 wraps around and is refused too. */
        if (offset - 1 >= (size_t)(d - out)) return CORRUPT_BLOCK;
        const uint8_t *from = d - offset;
        if (from < unwritten_to) {
            NAME(fill)(f, out, plane);
            unwritten_to = out;
        }
        length = (token & 15) + 4;
        /* Most matches are short, at any offset: they take one way, without a branch on it. */
#if PIECE == 64
        if (length != 19) {
            if (length > (size_t)(full - d)) return CORRUPT_BLOCK;
            const uint8_t *const places = PERIODIC64[offset < 32 ? offset : 0];
            const __m256i piece = _mm256_permutexvar_epi8(
                _mm256_loadu_si256((const void *)places), _mm256_loadu_si256((const void *)from));
            _mm256_storeu_si256((void *)d, piece);
            d += length;
            continue;
        }
        if (!(length = NAME(long_length)(&s, end))) return CORRUPT_BLOCK;
        length += 4;
#else
        if (length <= 16) {
            if (length > (size_t)(full - d)) return CORRUPT_BLOCK;
            const sixteen piece = NAME(repeated)(from, offset < 16 ? offset : 0);
            memcpy(d, &piece, sizeof piece);
            d += length;
            continue;
        }
        if (length == 19) {
            if (!(length = NAME(long_length)(&s, end))) return CORRUPT_BLOCK;
            length += 4;
        }
#endif
        if (length > (size_t)(full - d)) return CORRUPT_BLOCK;
        uint8_t *const stop = d + length;
        if (offset == plane && length >= 4 * plane) {
            if (f->same_to) NAME(fill)(f, out, plane);
            /* Written are the rest of the plane at hand, the last whole plane, and what follows. */
            const int next = (int)((size_t)(d - out + plane - 1) / plane);
            const int last = (int)((size_t)(stop - out) / plane) - 1;
            f->same_from = next;
            f->same_to = last;
            unwritten_to = out + (size_t)last * plane;
            const uint8_t *const like = out + (size_t)(next - 1) * plane;
            memcpy(d, from, (size_t)(out + (size_t)next * plane - d));
            memcpy(unwritten_to, like, plane);
            memcpy(unwritten_to + plane, like, (size_t)(stop - unwritten_to) - plane);
        } else {
            NAME(copy_match)(d, stop, from, offset);
        }
        d = stop;
    }
    return CORRUPT_BLOCK;
}

ALWAYS int NAME(is_zero)(vector x) {
#if PIECE == 64
    return !_mm512_test_epi64_mask((__m512i)x, (__m512i)x);
#elif defined(__AVX__)
    return _mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    uint64_t any = 0;
    for (int i = 0; i < PIECE / 8; i++) any |= x[i];
    return any == 0;
#endif
}

/* Plane p of a block, or the one that it equals. */
ALWAYS const uint8_t *NAME(plane_of)(const struct frame *f, const uint8_t *planes, size_t bytes,
                                     int p) {
    return planes + (size_t)(p >= f->same_from && p < f->same_to ? f->same_from - 1 : p) * bytes;
}

/* Whether any of the planes [from, to) has a one where `valid` has. */
static int NAME(any_set)(const struct frame *f, const uint8_t *restrict planes, size_t bytes,
                         const uint8_t *restrict valid, int from, int to) {
    const uint8_t *plane[32];
    int number = 0;
    for (int p = from; p < to; p++)
        /* One stands for all that are alike. */
        if (p == from || p < f->same_from || p >= f->same_to)
            plane[number++] = NAME(plane_of)(f, planes, bytes, p);
    vector found = {0};
    size_t i = 0;
    /* Four vectors of each plane at a time, so that loads follow each other without a branch. */
    for (; i + 4 * PIECE <= bytes; i += 4 * PIECE) {
        vector all[4] = {{0}}, one;
        for (int n = 0; n < number; n++)
            for (int j = 0; j < 4; j++) {
                memcpy(&one, plane[n] + i + j * PIECE, sizeof one);
                all[j] |= one;
            }
        for (int j = 0; j < 4; j++) {
            memcpy(&one, valid + i + j * PIECE, sizeof one);
            found |= all[j] & one;
        }
    }
    if (!NAME(is_zero)(found)) return 1;
    for (; i < bytes; i++)
        for (int n = 0; n < number; n++)
            if (plane[n][i] & valid[i]) return 1;
    return 0;
}

/* Which pixels of a block are no measurement though the mask lets them through: `bad`. `keep`
 * has a one for each pixel whose value counts; a negative one may be valid and count as zero.
 */
static void NAME(judge)(const struct frame *f, const uint8_t *restrict planes, size_t bytes,
                        const uint8_t *restrict valid, uint8_t *restrict bad,
                        uint8_t *restrict keep, uint8_t *restrict equal) {
    const int top = f->bits - 1;
    memset(bad, 0, bytes);
    memset(equal, 0xff, bytes);
    for (int p = top; p >= 0; p--) {
        const uint8_t *restrict plane = planes + (size_t)p * bytes;
        /* Two's complements compare like unsigned numbers once the sign is turned over. */
        const uint8_t turn = f->is_signed && p == top ? 0xff : 0;
        if ((f->high >> p & 1) != (turn & 1))
            for (size_t i = 0; i < bytes; i++) equal[i] &= plane[i] ^ turn;
        else
            for (size_t i = 0; i < bytes; i++) {
                const uint8_t one = plane[i] ^ turn;
                bad[i] |= equal[i] & one;
                equal[i] &= (uint8_t)~one;
            }
    }
    if (f->has_error) {
        memset(equal, 0xff, bytes);
        for (int p = top; p >= 0; p--) {
            const uint8_t *restrict plane = planes + (size_t)p * bytes;
            const uint8_t turn = f->error >> p & 1 ? 0 : 0xff;
            for (size_t i = 0; i < bytes; i++) equal[i] &= plane[i] ^ turn;
        }
        for (size_t i = 0; i < bytes; i++) bad[i] |= equal[i];
    }
    memset(keep, 0xff, bytes);
    if (f->is_signed) {
        const uint8_t *restrict sign = planes + (size_t)top * bytes;
        for (size_t i = 0; i < bytes; i++) keep[i] = (uint8_t)~sign[i];
        if (f->negative_is_invalid)
            for (size_t i = 0; i < bytes; i++) bad[i] |= sign[i];
    }
    for (size_t i = 0; i < bytes; i++) {
        bad[i] &= valid[i];
        keep[i] &= valid[i] & (uint8_t)~bad[i];
    }
}

/* Put one plane of a block, where `mask` has ones, behind what is there of it. A plane without
 * ones is not written before it has its first; which pixels may have ones is kept.
 */
ALWAYS void NAME(put)(struct frame *f, int p, const uint8_t *restrict from,
                      const uint8_t *restrict mask, size_t bytes, int64_t pixels) {
    const size_t at = (size_t)(f->filled - f->base) / 8;
    uint8_t *restrict to = f->plane[p];
    if (!f->in_use[p]) {
        memset(to, 0, at);
        f->in_use[p] = 1;
        f->first_one[p] = f->filled;
    }
    to += at;
    uint8_t some = 0;
    for (size_t i = 0; i < bytes; i++) some |= to[i] = from[i] & mask[i];
    if (some) f->last_one[p] = f->filled + pixels;
}

/* Take in the planes of `pixels` pixels, `bytes` bytes each. */
static void NAME(append)(struct frame *f, uint8_t *planes, size_t bytes, int64_t pixels) {
    const size_t at = (size_t)(f->filled - f->base) / 8;
    const uint8_t *mask = f->valid ? f->valid + f->filled / 8 : f->ones;
    int limit = f->bits, bad = 0;
    while (limit > 0 && !f->in_use[limit - 1]) limit--;
    if (f->judge_all || limit > f->certain || NAME(any_set)(f, planes, bytes, mask, limit, f->bits)) {
        limit = f->bits;
        if (f->judge_all || NAME(any_set)(f, planes, bytes, mask, f->certain, f->bits)) {
            NAME(fill)(f, planes, bytes);
            NAME(judge)(f, planes, bytes, mask, f->bad, f->keep, f->equal);
            for (size_t i = 0; i < bytes; i++) bad |= f->bad[i];
            mask = f->keep;
        }
    }
    for (int p = 0; p < f->bits; p++)
        if (p < limit && (f->in_use[p] || NAME(any_set)(f, planes, bytes, mask, p, p + 1)))
            NAME(put)(f, p, NAME(plane_of)(f, planes, bytes, p), mask, bytes, pixels);
        else if (f->in_use[p])
            memset(f->plane[p] + at, 0, bytes);
    if (bad)
        NAME(put)(f, BAD_PLANE, f->bad, f->ones, bytes, pixels);
    else if (f->in_use[BAD_PLANE])
        memset(f->plane[BAD_PLANE] + at, 0, bytes);
    f->filled += pixels;
}

/* Ones in each field of 8, 4 or 2 bits, in that field. */
ALWAYS vector NAME(field_ones)(vector x, const int field) {
    x -= x >> 1 & EVERY(0x55);
    if (field == 2) return x;
    x = (x & EVERY(0x33)) + (x >> 2 & EVERY(0x33));
    if (field == 4) return x;
    return (x + (x >> 4)) & EVERY(0x0f);
}

#define ADD3(sum, carry, a, b, c)                 \
    do {                                          \
        const vector half_ = (a) ^ (b), c_ = (c); \
        carry = ((a) & (b)) | (half_ & c_);       \
        sum = half_ ^ c_;                         \
    } while (0)

/* Ones of `rows` rows in each field: count[j] holds, in every byte, those of its field j.
 *
 * The rows are added as bits first (Harley and Seal; Warren, Hacker's Delight, 5-1), so that
 * ones are counted in a few words and not in every row.
 */
ALWAYS void NAME(count_ones)(const vector *row, const int rows, const int field, vector *count) {
#if PIECE == 64
    if (rows == 8) {
        __m512i all = _mm512_popcnt_epi8((__m512i)row[0]);
        for (int r = 1; r < 8; r++)
            all = _mm512_add_epi8(all, _mm512_popcnt_epi8((__m512i)row[r]));
        count[0] = (vector)all;
        return;
    }
#endif
    vector part[4];
    int parts;
    if (rows == 8) {
        vector a, b, c, d, e, g, s, t;
        ADD3(s, a, row[0], row[1], row[2]);
        ADD3(t, b, row[3], row[4], row[5]);
        ADD3(s, c, s, t, row[6]);
        part[0] = s ^ row[7];
        d = s & row[7];
        ADD3(s, e, a, b, c);
        part[1] = s ^ d;
        g = s & d;
        part[2] = e ^ g;
        part[3] = e & g;
        parts = 4;
    } else if (rows == 4) {
        vector a, b, s;
        ADD3(s, a, row[0], row[1], row[2]);
        part[0] = s ^ row[3];
        b = s & row[3];
        part[1] = a ^ b;
        part[2] = a & b;
        parts = 3;
    } else {
        part[0] = row[0] ^ row[1];
        part[1] = row[0] & row[1];
        parts = 2;
    }
    for (int i = 0; i < parts; i++) part[i] = NAME(field_ones)(part[i], field);
    for (int j = 0; j < 8 / field; j++) {
        const vector only = EVERY((1 << field) - 1);
        vector all = part[parts - 1] >> (j * field) & only;
        for (int i = parts - 2; i >= 0; i--) all = all + all + (part[i] >> (j * field) & only);
        count[j] = all;
    }
}

/* All ones in each field that has any. */
ALWAYS vector NAME(filled)(vector x, const int field) {
#if PIECE == 64
    if (field == 8) return (vector)_mm512_movm_epi8(_mm512_test_epi8_mask((__m512i)x, (__m512i)x));
#endif
    if (field == 8) {
        x |= x >> 4 & EVERY(0x0f);
        x |= x >> 2 & EVERY(0x33);
        x |= x >> 1;
        x &= EVERY(0x01);
        return (x << 8) - x;
    }
    if (field == 4) {
        x |= x >> 2 & EVERY(0x33);
        x |= x >> 1;
        x &= EVERY(0x11);
        return (x << 4) - x;
    }
    x |= x >> 1;
    x &= EVERY(0x55);
    return x | x << 1;
}

/* Bits [8 * at, 8 * (at + PIECE)) of each row of a band, in one plane; their union. */
ALWAYS vector NAME(load_rows)(const struct frame *f, const uint8_t *plane, size_t at, vector last,
                              const int rows, const vector *shift, vector *row) {
    vector any = {0};
    for (int r = 0; r < rows; r++) {
        vector here, next;
        memcpy(&here, plane + f->row_byte[r] + at, sizeof here);
        /* A row begins at any bit. */
#if PIECE == 64
        memcpy(&next, plane + f->row_byte[r] + at + 8, sizeof next);
        row[r] = (vector)_mm512_shrdv_epi64((__m512i)here, (__m512i)next, (__m512i)shift[r]) & last;
#else
        /* The two shifts agree where both have bits. */
        memcpy(&next, plane + f->row_byte[r] + at + 1, sizeof next);
        row[r] = (here >> shift[r] | next << (EVERY_WORD(8) - shift[r])) & last;
#endif
        any |= row[r];
    }
    return any;
}

/* Whether a piece of some rows can have ones; a few bits of its neighbours are looked at too. */
ALWAYS int NAME(has_ones)(const struct frame *f, const uint8_t *plane, size_t at, int first,
                          int end) {
    vector any = {0};
    for (int r = first; r < end; r++) {
        vector here, next;
        memcpy(&here, plane + f->row_byte[r] + at, sizeof here);
        memcpy(&next, plane + f->row_byte[r] + at + 1, sizeof next);
        any |= here | next;
    }
    return !NAME(is_zero)(any);
}

#if PIECE == 64
ALWAYS __m128i NAME(lane_of)(const uint8_t *lanes, int lane) {
    return _mm_loadu_si128((const void *)(lanes + 16 * lane));
}
#endif

/* Write the lowest byte of the maxima and the sums over the lowest planes, field after field:
 * top[j] has field j of every byte, sum[j] that of the even and of the odd bytes.
 */
ALWAYS void NAME(store_low)(uint32_t *maximum, uint64_t *total, const vector *top,
                            const vector (*sum)[2], const int fields) {
#if PIECE == 64
    /* Instructions that interleave work on lanes of 16 bytes, which hold 16 * fields fields. */
    __m512i bytes[4], words[8];
    for (int j = 0; j < fields; j++) {
        bytes[j] = (__m512i)top[j];
        words[2 * j] = _mm512_unpacklo_epi16((__m512i)sum[j][0], (__m512i)sum[j][1]);
        words[2 * j + 1] = _mm512_unpackhi_epi16((__m512i)sum[j][0], (__m512i)sum[j][1]);
    }
    if (fields == 2) {
        const __m512i a = bytes[0], b = bytes[1], c = words[0], d = words[1], e = words[2],
                      g = words[3];
        bytes[0] = _mm512_unpacklo_epi8(a, b);
        bytes[1] = _mm512_unpackhi_epi8(a, b);
        words[0] = _mm512_unpacklo_epi16(c, e);
        words[1] = _mm512_unpackhi_epi16(c, e);
        words[2] = _mm512_unpacklo_epi16(d, g);
        words[3] = _mm512_unpackhi_epi16(d, g);
    } else if (fields == 4) {
        const __m512i a = _mm512_unpacklo_epi8(bytes[0], bytes[1]),
                      b = _mm512_unpackhi_epi8(bytes[0], bytes[1]),
                      c = _mm512_unpacklo_epi8(bytes[2], bytes[3]),
                      d = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
        bytes[0] = _mm512_unpacklo_epi16(a, c);
        bytes[1] = _mm512_unpackhi_epi16(a, c);
        bytes[2] = _mm512_unpacklo_epi16(b, d);
        bytes[3] = _mm512_unpackhi_epi16(b, d);
        __m512i all[8];
        for (int half = 0; half < 2; half++) {
            const __m512i e = _mm512_unpacklo_epi16(words[half], words[2 + half]),
                          g = _mm512_unpackhi_epi16(words[half], words[2 + half]),
                          h = _mm512_unpacklo_epi16(words[4 + half], words[6 + half]),
                          i = _mm512_unpackhi_epi16(words[4 + half], words[6 + half]);
            all[4 * half] = _mm512_unpacklo_epi32(e, h);
            all[4 * half + 1] = _mm512_unpackhi_epi32(e, h);
            all[4 * half + 2] = _mm512_unpacklo_epi32(g, i);
            all[4 * half + 3] = _mm512_unpackhi_epi32(g, i);
        }
        for (int n = 0; n < 8; n++) words[n] = all[n];
    }
    uint8_t lanes[8][64];
    for (int n = 0; n < fields; n++) memcpy(lanes[n], &bytes[n], sizeof lanes[n]);
    for (int lane = 0; lane < 4; lane++)
        for (int n = 0; n < fields; n++, maximum += 16)
            _mm512_storeu_si512(maximum, _mm512_cvtepu8_epi32(NAME(lane_of)(lanes[n], lane)));
    for (int n = 0; n < 2 * fields; n++) memcpy(lanes[n], &words[n], sizeof lanes[n]);
    for (int lane = 0; lane < 4; lane++)
        for (int n = 0; n < 2 * fields; n++, total += 8)
            _mm512_storeu_si512(total, _mm512_cvtepu16_epi64(NAME(lane_of)(lanes[n], lane)));
#else
    for (int j = 0; j < fields; j++) {
        uint8_t bytes[PIECE];
        uint16_t words[PIECE / 2];
        memcpy(bytes, &top[j], sizeof bytes);
        for (int i = 0; i < PIECE; i++) maximum[i * fields + j] = bytes[i];
        for (int half = 0; half < 2; half++) {
            memcpy(words, &sum[j][half], sizeof words);
            for (int i = 0; i < PIECE / 2; i++) total[(2 * i + half) * fields + j] = words[i];
        }
    }
#endif
}

/* Reduce PIECE bytes of a band to fields: `field` bits of a row, over `rows` rows.
 *
 * The sum of a field is the number of ones of each plane, weighted by the plane. Its maximum is
 * found from the highest plane down: where a pixel still running has a one, those without fall
 * out, and the maximum has that bit. Planes without ones cost their reading.
 */
ALWAYS void NAME(reduce_piece)(struct frame *f, size_t at, vector last, const vector *shift,
                               const int rows, const int field) {
    enum { LANES = PIECE / 2 };
    const int fields = 8 / field;
    vector row[8], running[8], count[4], sum[4][4][2], top[4][4];
    int sums = 1, tops = 1;
    for (int r = 0; r < rows; r++) running[r] = ~(vector){0};
    for (int g = 0; g < 4; g++)
        for (int j = 0; j < fields; j++) sum[g][j][0] = sum[g][j][1] = top[g][j] = (vector){0};
    const vector even = EVERY(0xff) & ((vector){0} + UINT64_C(0x00ff00ff00ff00ff));
    for (int n = 0; n < f->used_count; n++) {
        const int p = f->used[n];
        if (f->is_sparse[n] && !NAME(has_ones)(f, f->plane[p], at, f->first_row[n], f->end_row[n]))
            continue;
        if (NAME(is_zero)(NAME(load_rows)(f, f->plane[p], at, last, rows, shift, row))) continue;
        NAME(count_ones)(row, rows, field, count);
        /* Sixteen bits hold the sum over ten planes: 64 ones of each weigh 64 * 1023. */
        const int g = p / 10, shift = p % 10;
        if (sums <= g) sums = g + 1;
        for (int j = 0; j < fields; j++) {
            sum[g][j][0] += (count[j] & even) << shift;
            sum[g][j][1] += (count[j] >> 8 & even) << shift;
        }
        vector left = {0};
        for (int r = 0; r < rows; r++) left |= running[r] & row[r];
        const vector has = NAME(filled)(left, field), out = ~has;
        for (int r = 0; r < rows; r++) running[r] &= row[r] | out;
        const int byte = p / 8;
        if (tops <= byte) tops = byte + 1;
        for (int j = 0; j < fields; j++)
            top[byte][j] |= (has >> (j * field) & EVERY(1)) << (p % 8);
    }
    NAME(store_low)(f->field_maximum + at * fields, f->field_total + at * fields, &top[0][0],
                    &sum[0][0], fields);
    uint32_t *const maximum = f->field_maximum + at * fields;
    uint64_t *const total = f->field_total + at * fields;
    for (int j = 0; j < fields; j++) {
        uint8_t bytes[PIECE];
        uint16_t words[LANES];
        for (int byte = 1; byte < tops; byte++) {
            memcpy(bytes, &top[byte][j], sizeof bytes);
            for (int i = 0; i < PIECE; i++)
                maximum[i * fields + j] |= (uint32_t)bytes[i] << (8 * byte);
        }
        for (int g = 1; g < sums; g++)
            for (int half = 0; half < 2; half++) {
                memcpy(words, &sum[g][j][half], sizeof words);
                for (int i = 0; i < LANES; i++)
                    total[(2 * i + half) * fields + j] += (uint64_t)words[i] << (10 * g);
            }
    }
}

/* Count the pixels of a piece that are no measurement, into f->field_lost. */
ALWAYS void NAME(count_lost)(struct frame *f, size_t at, vector last, const vector *shift,
                             const int rows, const int field) {
    const int fields = 8 / field;
    vector row[8], count[4];
    NAME(load_rows)(f, f->plane[BAD_PLANE], at, last, rows, shift, row);
    NAME(count_ones)(row, rows, field, count);
    for (int j = 0; j < fields; j++) {
        uint8_t bytes[PIECE];
        memcpy(bytes, &count[j], sizeof bytes);
        for (int i = 0; i < PIECE; i++) f->field_lost[(at + i) * fields + j] = bytes[i];
    }
}

ALWAYS void NAME(reduce_rows)(struct frame *f, const int rows, const int field) {
    const size_t bytes = (size_t)(f->nx + 7) / 8;
    vector shift[8];
    for (int r = 0; r < rows; r++) shift[r] = EVERY_WORD(0) + (uint64_t)f->row_shift[r];
    for (size_t at = 0; at < bytes; at += PIECE) {
        vector last = ~(vector){0};
        if (at + PIECE >= bytes) {
            uint8_t edge[PIECE] = {0};
            memset(edge, 0xff, f->nx / 8 - at);
            if (f->nx % 8) edge[f->nx / 8 - at] = (uint8_t)((1 << f->nx % 8) - 1);
            memcpy(&last, edge, sizeof last);
        }
        NAME(reduce_piece)(f, at, last, shift, rows, field);
        if (f->in_use[BAD_PLANE]) NAME(count_lost)(f, at, last, shift, rows, field);
    }
}

/* Reduce every band whose rows are all there. */
static void NAME(reduce_bands)(struct frame *f) {
    const int rows = f->rows;
    int64_t y = f->next_row;
    while (y < f->ny) {
        const int64_t end = y + rows < f->ny ? y + rows : f->ny;
        if (f->filled < end * f->nx) break;
        for (int r = 0; r < end - y; r++) {
            const int64_t bit = (y + r) * f->nx - f->base;
            f->row_byte[r] = (size_t)(bit / 8);
            f->row_shift[r] = (int)(bit % 8);
        }
        if (end - y < rows) add_empty_rows(f, (int)(end - y));
        choose_planes(f, y, end);
        if (rows == 8)
            NAME(reduce_rows)(f, 8, 8);
        else if (rows == 4)
            NAME(reduce_rows)(f, 4, 4);
        else
            NAME(reduce_rows)(f, 2, 2);
        fold_band(f, y);
        y = end;
    }
    if (y == f->next_row) return;
    f->next_row = y;
    const int64_t base = y < f->ny ? y * f->nx / 8 * 8 : f->filled / 8 * 8;
    const size_t gone = (size_t)(base - f->base) / 8;
    const size_t left = (size_t)(f->filled - base + 7) / 8;
    for (int p = 0; p < PLANES; p++) {
        f->in_use[p] = f->in_use[p] && f->last_one[p] > y * f->nx;
        if (f->in_use[p]) memmove(f->plane[p], f->plane[p] + gone, left);
    }
    f->base = base;
}

/* Reduce a frame; 0, or a fault code. */
static int NAME(reduce_frame)(struct frame *f, const uint8_t *s, const uint8_t *end,
                              int64_t block_pixels, uint8_t *scratch, uint8_t *spare) {
    const int64_t pixels = f->nx * f->ny, whole = pixels / 8 * 8;
    const int item = f->bits / 8;
    while (f->filled < whole) {
        const int64_t n = block_pixels < whole - f->filled ? block_pixels : whole - f->filled;
        const size_t size = (size_t)n * item;
        if (end - s < 4) return NO_BLOCK_HEADER;
        const size_t length = big_endian_u32(s);
        s += 4;
        if (length > (size_t)(end - s)) return LONG_BLOCK;
        const uint8_t *from = s;
        if ((size_t)(end - s) - length < READ_BEHIND) {
            /* No valid block is as long as this: four bytes of output cost three at most. */
            if (length > 2 * size + 16) return CORRUPT_BLOCK;
            memcpy(spare, s, length);
            from = spare;
        }
        const int fault = NAME(lz4_block)(f, from, from + length, scratch, size);
        if (fault) return fault;
        s += length;
        if (f->big_endian) {
            NAME(fill)(f, scratch, (size_t)n / 8);
            turn_bytes(f, scratch, (size_t)n / 8);
        }
        NAME(append)(f, scratch, (size_t)n / 8, n);
        NAME(reduce_bands)(f);
    }
    const int64_t tail = pixels - whole;
    if (end - s < tail * item) return SHORT_TAIL;
    if (end - s > tail * item) return BYTES_LEFT;
    if (tail) {
        f->same_from = f->same_to = 0;
        planes_of_tail(f, s, (int)tail, scratch);
        if (f->big_endian) turn_bytes(f, scratch, 1);
        NAME(append)(f, scratch, 1, tail);
        NAME(reduce_bands)(f);
    }
    return 0;
}

#undef vector
#undef sixteen
#undef EVERY
#undef EVERY_WORD
#undef ADD3
