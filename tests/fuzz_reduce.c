/* Mutated payloads against the kernels of _reduce_frame.h, in memory that ends where they may.
 *
 *     fuzz_reduce PAYLOAD BITS SIGNED NY NX BLOCK_BYTES K HIGH ROUNDS SEED
 *
 * PAYLOAD holds the blocks of a frame without a header. Each round changes a copy, reduces it by
 * every kind of kernels, and sees that all say the same. Ends with the number of rounds and of
 * payloads that were accepted.
 */

#include <stdio.h>
#include <stdlib.h>

#include "_reduce_frame.h"

static uint64_t state;

static uint64_t any(uint64_t below) {
    /* xorshift64* (Vigna, 2016) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * UINT64_C(2685821657736338717) >> 11) % below;
}

static size_t mutate(uint8_t *bytes, size_t length) {
    const size_t times = 1 + any(6);
    for (size_t i = 0; i < times && length > 0; i++) {
        const size_t at = any(length);
        switch (any(8)) {
        case 0: bytes[at] ^= (uint8_t)(1 << any(8)); break;
        case 1: bytes[at] = (uint8_t)any(256); break;
        case 2: bytes[at] = any(2) ? 0xff : 0; break;
        case 3: length = at; break;
        case 4: memmove(bytes + at, bytes + at + 1, length - at - 1), length--; break;
        case 5: {
            const size_t from = any(length), most = length - (at > from ? at : from);
            memmove(bytes + at, bytes + from, any(most + 1));
            break;
        }
        case 6: memset(bytes + at, 0xff, any(length - at < 20 ? length - at : 20)); break;
        default: bytes[any(length < 64 ? length : 64)] += (uint8_t)(any(5) - 2); break;
        }
    }
    return length;
}

int main(int count, char **arguments) {
    if (count != 11) return 2;
    FILE *file = fopen(arguments[1], "rb");
    if (!file) return 2;
    static uint8_t original[1 << 20], changed[1 << 20];
    const size_t whole = fread(original, 1, sizeof original, file);
    fclose(file);
    const int64_t block_bytes = atoll(arguments[6]);
    struct frame described = {
        .bits = atoi(arguments[2]),
        .is_signed = atoi(arguments[3]),
        .ny = atoll(arguments[4]),
        .nx = atoll(arguments[5]),
        .k = atoll(arguments[7]),
        .high = atoll(arguments[8]),
        .negative_is_invalid = atoi(arguments[3]),
    };
    const long rounds = atol(arguments[9]);
    state = strtoull(arguments[10], 0, 10) * 2 + 1;
    find_kernels();
    const struct frame base = described;
    if (describe(&described, block_bytes)) return 2;
    const size_t rows = (size_t)((described.ny + described.k - 1) / described.k);
    described.stride = (described.nx + described.k - 1) / described.k;
    const size_t cells = rows * (size_t)described.stride;
    uint8_t *scratch, *spare;
    const size_t size = lay_out(&described, (size_t)block_bytes, 0, &scratch, &spare);
    uint16_t *valid_count = calloc(cells, sizeof *valid_count);
    long accepted = 0;
    for (long round = 0; round < rounds; round++) {
        memcpy(changed, original, whole);
        const size_t length = round ? mutate(changed, whole) : whole;
        uint8_t *payload = malloc(length ? length : 1);
        memcpy(payload, changed, length);
        /* With and without a mask, an error value in the range of counts, and turned bytes. */
        struct frame asked = base;
        const size_t mask_bytes = (size_t)(asked.ny * asked.nx + 7) / 8 + 64;
        uint8_t *mask = round % 2 ? malloc(mask_bytes) : 0;
        for (size_t i = 0; mask && i < mask_bytes; i++) mask[i] = (uint8_t)any(256);
        asked.stride = described.stride;
        asked.valid = mask;
        asked.has_error = round % 3 == 1;
        asked.error = (int64_t)any(4);
        asked.big_endian = round % 5 == 4;
        if (describe(&asked, block_bytes)) return 2;
        int first = 0;
        void *kept = 0;
        for (int kind = 0; kind < kinds; kind++) {
            struct frame f = asked;
            uint8_t *work = aligned_alloc(64, (size + 63) / 64 * 64), *out = calloc(cells, 14);
            lay_out(&f, (size_t)block_bytes, work, &scratch, &spare);
            f.total = (uint64_t *)(void *)out;
            f.maximum = (uint32_t *)(void *)(out + 8 * cells);
            f.count = (uint16_t *)(void *)(out + 12 * cells);
            f.valid_count = valid_count;
            const int fault = KINDS[kind].reduce_frame(
                &f, payload, payload + length, block_bytes / (f.bits / 8), scratch, spare);
            free(work);
            if (fault < 0 || fault > 6 || (kind && fault != first) ||
                (kind && !fault && memcmp(kept, out, 14 * cells))) {
                fprintf(stderr, "round %ld: %s says %d, %s %d\n", round, KINDS[kind].processor,
                        fault, KINDS[0].processor, first);
                return 1;
            }
            if (kind)
                free(out);
            else
                kept = out, first = fault;
        }
        if (!round && first) return fprintf(stderr, "the payload itself: %d\n", first), 1;
        accepted += !first;
        free(kept);
        free(payload);
        free(mask);
    }
    free(valid_count);
    printf("%ld rounds, %ld accepted\n", rounds, accepted);
    return 0;
}
