// From compressed frames to cells, views and tiles. The CPU twins are lz4.py and cpu.py.
//
// The way of nearly every frame is reduce_blocks: one LZ4 block of 8 to 64 KiB is decoded into the
// shared memory of one warp and reduced there; the pixels of a frame are never written to global
// memory. What crosses the bus is the compressed bytes, and what leaves the kernel is three
// integers per cell of k x k pixels.
//
// Memory. The bytes of several frames lie one behind the other in one buffer, with a Span for each
// LZ4 block. A Job for each frame of the batch says what its bytes mean; both are written by
// cuda.py, which has the same layouts. The results of frame i are row i of (frames, grid, grid).
//
// Work. A thread block is one warp, so shared memory alone decides how many blocks a processor
// decodes at a time, and no barrier is wider than a warp. LZ4 is serial: all lanes read the same
// tokens and share the copying. A decoded block is bit planes: bit i of plane p is bit p of pixel
// i. No pixel is ever put together from them, and they serve as they lie, because the planes of a
// block of 8 KiB are whole words; others are moved apart first. A lane takes a cell, gathers the
// cell's pixels of up to 32 / k rows from each plane into one word, and then one instruction works
// on 32 pixels: validity by comparing bit by bit from the highest plane, the sum by counting bits,
// the maximum by keeping the candidates that have the next bit. What the block holds of a cell
// goes to global memory by one atomic each; a block has about one cell in ten pixels, so they are
// few, and being integers their order does not matter.
//
// Frames that are no bitshuffled integers in such blocks are decoded to global memory
// (decode_blocks, unshuffle, swap_bytes) and reduced by a thread per cell (reduce_<type>).
//
// Compiled by NVRTC with --fmad=false: float results then use the same operations in the same
// order as the twins and agree bit for bit. Nothing here synchronises between thread blocks.
// Every read of a payload and every write is checked; a corrupt block reports a fault code.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

#ifndef SHARED_WORDS
#define SHARED_WORDS(name) extern __shared__ u32 name[]  // as many as the launch asks for
#endif

#define LANES 32  // threads that work on one compressed block: a warp
#define BLOCKS_AT_A_TIME 24  // so many blocks of 8 KiB fit into an H100's processor: few registers

#define LONG_MATCH 256             // bytes from which a match is copied in words
#define WORDS_APART (4 * LANES + 4)  // bytes from which no lane reads what others write

#define CORRUPT_BLOCK 3  // see FAULTS in payload.py
#define WRONG_SIZE 4

// Where the bytes of one LZ4 block lie in their buffer, and the row of the frame it belongs to,
// or -1: nothing is to be done.
struct Span {
  i64 start;
  i32 length;
  i32 frame;
};

// What one frame's bytes mean.
struct Job {
  u64 valid;        // address of a bit per pixel, 1 where the mask lets it count; 0: no mask
  u64 bins;         // address of the radial bin of each cell; 0: no geometry
  i64 high, error;  // see Limits in recipe.py
  i64 tail;         // where the last, fewer than eight, pixels lie in the buffer
  i32 first_span;   // of this frame
  i32 whole;        // decoded bytes that are in blocks
  i32 block_bytes;
  i32 item;       // bytes of a pixel
  i32 is_signed;  // two's complement
  i32 swapped;    // the other byte order
  i32 negative_is_invalid;
  i32 ny, nx;
  i32 k;           // pixels per side of a cell; 0: the frame has no views
  float expected;  // sigma by which chance explains a cell's maximum
};

__device__ static i64 thread_index() {
  return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

// The photons of a pixel, or -1 where it is no measurement.
template <typename T>
__device__ static i64 photons(T pixel, i64 high, i64 error, i32 negative_is_invalid) {
  const i64 v = (i64)pixel;
  if (v > high || v == error) return -1;
  if (v < 0) return negative_is_invalid ? -1 : 0;
  return v;
}

__device__ static i64 photons(float pixel, i64 high, i64, i32) {
  const float v = rintf(pixel);
  if (!(v >= -3.402823466e38f && v <= 3.402823466e38f) || (double)v > (double)high) return -1;
  return v > 0.0f ? (i64)v : 0;
}

// ---- decoding

// Adds the bytes that a length goes on with; false where they run out or tell of more than `room`.
__device__ __forceinline__ static bool lz4_longer(const u8* src, i32* s, i32 s_end, i32 room,
                                                  i32* length) {
  int more;
  do {
    if (*s >= s_end || *length > room) return false;
    more = src[(*s)++];
    *length += more;
  } while (more == 255);
  return true;
}

// Repeats the last `offset` bytes before `to` until `length` bytes are written.
__device__ __forceinline__ static void lz4_match(u8* to, i32 offset, i32 length, int lane) {
  // Few matches are long, but they are most of a block: its empty planes. They go by words, which
  // do not overlap what the lanes write at the same time when they come from a multiple of the
  // offset away that is large enough; so far, and up to a whole word, byte by byte.
  const bool is_long = length >= LONG_MATCH;
  i32 apart = offset, first = length;
  if (is_long) {
    if (offset < WORDS_APART) apart = (WORDS_APART + offset - 1) / offset * offset;
    first = apart - offset;
    first += (i32)(-(u64)(to + first) & 3);
  }
  const u8* from = to - offset;
  const i32 step = offset < LANES ? LANES % offset : LANES;
  i32 at = offset < LANES ? lane % offset : lane;
  for (i32 i = lane; i < first; i += LANES) {
    to[i] = from[at];
    at += step;
    if (at >= offset) at -= offset;
  }
  if (!is_long) return;
  __syncwarp();
  u32* target = (u32*)(to + first);
  const u8* source = to + first - apart;
  const i32 skew = (i32)((u64)source & 3);
  const u32* words = (const u32*)(source - skew);
  const i32 count = (length - first) / 4;
  for (i32 turn = 0; turn < count; turn += LANES) {
    const i32 i = turn + lane;
    if (i < count) target[i] = __funnelshift_r(words[i], words[i + 1], 8 * skew);
    __syncwarp();
  }
  const i32 last = first + 4 * count + lane;
  if (last < length) to[last] = to[last - apart];
}

// One LZ4 block src[0, s_end) to dst[0, d_end); bytes written, or -1. All lanes of a warp take the
// same path; they share the copying. What the last copy wrote is for others to read behind a
// barrier.
__device__ __forceinline__ static i32 lz4_block(const u8* src, i32 s_end, u8* dst, i32 d_end,
                                                int lane) {
  i32 s = 0, d = 0;
  while (s < s_end) {
    const int token = src[s++];
    i32 literals = token >> 4;
    if (literals == 15 && !lz4_longer(src, &s, s_end, d_end - d, &literals)) return -1;
    if (literals > s_end - s || literals > d_end - d) return -1;
    for (i32 i = lane; i < literals; i += LANES) dst[d + i] = src[s + i];
    s += literals;
    d += literals;
    if (s == s_end) return d;  // the last sequence is literals alone
    if (s_end - s < 2) return -1;
    const i32 offset = src[s] | (src[s + 1] << 8);
    s += 2;
    if (offset == 0 || offset > d) return -1;
    i32 length = token & 15;
    if (length == 15 && !lz4_longer(src, &s, s_end, d_end - d, &length)) return -1;
    length += 4;
    if (length > d_end - d) return -1;
    __syncwarp();  // what the other lanes wrote so far is read below
    lz4_match(dst + d, offset, length, lane);
    d += length;
  }
  return -1;
}

// A warp per block of one frame. fault receives 8 * block + code of the first block that fails.
extern "C" __global__ void decode_blocks(const u8* src, const Span* spans, i64 block_bytes,
                                         i64 whole, i32 stored, u8* dst, u64* fault) {
  const i64 block = blockIdx.x;
  const int lane = threadIdx.x;
  const i64 at = block * block_bytes;
  const i32 size = (i32)(whole - at < block_bytes ? whole - at : block_bytes);
  const u8* from = src + spans[block].start;
  const i32 length = spans[block].length;
  if (stored && length == size) {
    for (i32 i = lane; i < size; i += LANES) dst[at + i] = from[i];
    return;
  }
  const i32 written = lz4_block(from, length, dst + at, size, lane);
  if (written != size && lane == 0) {
    atomicMin(fault, 8ull * (u64)block + (written < 0 ? CORRUPT_BLOCK : WRONG_SIZE));
  }
}

// ---- from bit planes to cells

// 32 bits from bit `at` on. Reads the word behind the one that holds it, whatever its bits.
__device__ __forceinline__ static u32 bits_from(const u32* words, i32 at) {
  const i32 word = at >> 5;
  return __funnelshift_r(words[word], words[word + 1], at & 31);
}

// What a block, or a pixel, adds to a cell.
__device__ __forceinline__ static void add_to_cell(i64 cell, u32 best, u64 added, u32 n,
                                                   u32* maximum, u64* total, u16* count) {
  if (best) atomicMax(maximum + cell, best);
  if (added) atomicAdd(total + cell, added);
  // Of 16 bits, which no atomic adds: added to the word that holds them, whose other half no carry
  // reaches, because a cell has at most 1024 pixels.
  u16* at = count + cell;
  const u32 upper = (u32)((u64)at >> 1 & 1);
  atomicAdd((u32*)(at - upper), n << (16 * upper));
}

// Moves planes of `pixels` bits, which lie without gaps, so that each begins at a word. Plane by
// plane from the last one on: none lands on what is still to be read.
__device__ __forceinline__ static void align_planes(u32* planes, i32 bits, i32 pixels, int lane) {
  const i32 words = (pixels + 31) / 32;
  for (i32 p = bits - 1; p > 0; --p) {
    for (i32 word = (words - 1) / LANES * LANES + lane; word >= 0; word -= LANES) {
      const u32 moved = word < words ? bits_from(planes, p * pixels + 32 * word) : 0;
      __syncwarp();
      if (word < words) planes[p * words + word] = moved;
      __syncwarp();
    }
  }
}

// The planes of the other byte order.
template <int BITS>
__device__ __forceinline__ static void swap_planes(u32* plane) {
#pragma unroll
  for (int p = 0; p < BITS / 2; ++p) {
    const u32 other = plane[p ^ (BITS - 8)];
    plane[p ^ (BITS - 8)] = plane[p];
    plane[p] = other;
  }
}

// Adds planes FROM down to TO of the pixels `counted`: to the sum by counting bits, to the largest
// value by keeping, of the pixels `left`, those that have the next lower bit if any has.
template <int FROM, int TO>
__device__ __forceinline__ static void count_planes(const u32* plane, u32 counted, u32* left,
                                                    u32* largest, u64* added) {
#pragma unroll
  for (int p = FROM; p >= TO; --p) {
    *added += (u64)__popc(plane[p] & counted) << p;
    const u32 with = plane[p] & *left;
    if (with) {
      *left = with;
      *largest |= 1u << p;
    }
  }
}

// Reduces `pixels` pixels, from pixel `first` of the frame on. Each plane begins at a word of
// `planes`, which has a word to spare before the first plane and behind the last. BITS is the
// width of a pixel. A lane per cell.
template <int BITS>
__device__ __forceinline__ static void reduce_planes(const u32* planes, i32 first, i32 pixels,
                                                     const Job& job, int lane, i32 grid,
                                                     u32* maximum, u64* total, u16* count) {
  const i32 k = job.k, nx = job.nx, last = first + pixels;
  const i32 y_first = first / nx, y_end = (last - 1) / nx + 1;
  const i32 across = (nx + k - 1) / k, cy_first = y_first / k;
  const i32 cells = ((y_end - 1) / k - cy_first + 1) * across;
  const i32 rows = 32 / k;  // of a cell that fit into a word
  const i32 stride = (pixels + 31) / 32;
  const u32* mask = (const u32*)job.valid;
  // Signed values are compared with their sign turned, which puts them in the order of unsigned
  // ones; so are the bounds.
  const u32 turned = job.is_signed ? ~0u : 0u;
  const i64 lowest = job.is_signed ? -(1ll << (BITS - 1)) : 0, range = (1ll << BITS) - 1;
  if (job.high < lowest) return;  // nothing counts
  const u32 high = (u32)(job.high - lowest < range ? job.high - lowest : range);
  const bool has_error = job.error >= lowest && job.error <= lowest + range;
  const u32 error = (u32)(job.error - lowest);
  // Where it is not, pixels below 256 are measurements, and most cells have no others.
  const bool any_may_be_bad = job.is_signed || high < 255;
  for (i32 index = lane; index < cells; index += LANES) {
    const i32 cy = cy_first + index / across, cx = index % across;
    const i32 x = cx * k, x_end = x + k < nx ? x + k : nx;
    const i32 y_last = cy * k + k < y_end ? cy * k + k : y_end;
    u32 best = 0, n = 0;
    u64 added = 0;
    for (i32 y = cy * k > y_first ? cy * k : y_first; y < y_last; y += rows) {
      u32 plane[BITS], usable = 0;
#pragma unroll
      for (int p = 0; p < BITS; ++p) plane[p] = 0;
      for (i32 row = y, place = 0; row < y_last && row < y + rows; ++row, place += k) {
        i32 from = row * nx + x, to = row * nx + x_end;
        from = from > first ? from : first;
        to = to < last ? to : last;
        if (from >= to) continue;
        // The bits before `from` come along, so that those wanted are in their place at once.
        const u32 keep = (~0u >> (32 - (to - from))) << place;
        usable |= mask ? bits_from(mask, from - place) & keep : keep;
        const i32 at = from - first - place;
        const u32* words = planes + (at >> 5);
#pragma unroll
        for (int p = 0; p < BITS; ++p) {
          plane[p] |= __funnelshift_r(words[0], words[1], at & 31) & keep;
          words += stride;
        }
      }
      if (!usable) continue;
      if (job.swapped) swap_planes<BITS>(plane);
      u32 upper = 0;
#pragma unroll
      for (int p = 8; p < BITS; ++p) upper |= plane[p];
      const u32 negative = plane[BITS - 1] & turned;
      if (any_may_be_bad || (upper & usable)) {
        u32 above = 0, equal = ~0u, same = has_error ? ~0u : 0u;
#pragma unroll
        for (int p = BITS - 1; p >= 0; --p) {
          const u32 bit = p == BITS - 1 ? plane[p] ^ turned : plane[p];
          const u32 wanted = high >> p & 1 ? ~0u : 0u;
          above |= equal & bit & ~wanted;
          equal &= ~(bit ^ wanted);
          same &= ~(bit ^ (error >> p & 1 ? ~0u : 0u));
        }
        usable &= ~(above | same | (job.negative_is_invalid ? negative : 0));
      }
      n += __popc(usable);
      const u32 counted = usable & ~negative;
      u32 left = counted, largest = 0;
      if (upper & counted) count_planes<BITS - 1, 8>(plane, counted, &left, &largest, &added);
      count_planes<7, 0>(plane, counted, &left, &largest, &added);
      best = largest > best ? largest : best;
    }
    if (n) add_to_cell((i64)cy * grid + cx, best, added, n, maximum, total, count);
  }
}

// The last pixels of a frame, fewer than eight, which are not shuffled. A lane per pixel.
__device__ static void reduce_tail(const u8* bytes, const Job& job, int lane, i32 grid,
                                   u32* maximum, u64* total, u16* count) {
  const i32 first = job.whole / job.item, at = first + lane, item = job.item;
  if (at >= job.ny * job.nx) return;
  if (job.valid && !(((const u32*)job.valid)[at >> 5] >> (at & 31) & 1)) return;
  u32 raw = 0;
  for (int b = 0; b < item; ++b) {
    raw |= (u32)bytes[job.tail + lane * item + (job.swapped ? item - 1 - b : b)] << (8 * b);
  }
  const u32 sign = job.is_signed ? 1u << (8 * item - 1) : 0;
  const i64 value = (i64)(raw ^ sign) - (i64)sign;
  const i64 v = photons(value, job.high, job.error, job.negative_is_invalid);
  if (v < 0) return;
  const i64 cell = (i64)(at / job.nx / job.k) * grid + at % job.nx / job.k;
  add_to_cell(cell, (u32)v, (u64)v, 1, maximum, total, count);
}

// A warp per block of any frame whose pixels have BITS bits. faults[frame] receives
// 8 * block + code of the first block that fails; the frame's cells are then of no use.
template <int BITS>
__device__ __forceinline__ static void reduce_block(u32* shared, const u8* bytes,
                                                    const Span* spans, const Job* jobs, i32 grid,
                                                    u32* maximum, u64* total, u16* count,
                                                    u64* faults) {
  const Span span = spans[blockIdx.x];
  if (span.frame < 0) return;
  const Job job = jobs[span.frame];
  const int lane = threadIdx.x;
  const i32 block = (i32)blockIdx.x - job.first_span;
  const i32 at = block * job.block_bytes;
  const i32 size = job.whole - at < job.block_bytes ? job.whole - at : job.block_bytes;
  const i64 cells = (i64)span.frame * grid * grid;
  maximum += cells;
  total += cells;
  count += cells;
  if (size > 0) {  // a frame of fewer than eight pixels has a span for its tail alone
    u32* planes = shared + 1;
    const i32 written = lz4_block(bytes + span.start, span.length, (u8*)planes, size, lane);
    if (written != size) {
      const u64 code = written < 0 ? CORRUPT_BLOCK : WRONG_SIZE;
      if (lane == 0) atomicMin(faults + span.frame, 8ull * (u64)block + code);
      return;
    }
    __syncwarp();
    const i32 first = at / (BITS / 8), pixels = size / (BITS / 8);
    if (pixels % 32) align_planes(planes, BITS, pixels, lane);
    reduce_planes<BITS>(planes, first, pixels, job, lane, grid, maximum, total, count);
  }
  if (at + size == job.whole) reduce_tail(bytes, job, lane, grid, maximum, total, count);
}

#define FOR_BITS(BITS)                                                                          \
  extern "C" __global__ void __launch_bounds__(LANES, BLOCKS_AT_A_TIME) reduce_blocks_##BITS(   \
      const u8* bytes, const Span* spans, const Job* jobs, i32 grid, u32* maximum, u64* total,  \
      u16* count, u64* faults) {                                                                \
    SHARED_WORDS(shared);                                                                       \
    reduce_block<BITS>(shared, bytes, spans, jobs, grid, maximum, total, count, faults);        \
  }

FOR_BITS(8)
FOR_BITS(16)
FOR_BITS(32)

// ---- from blocks to pixels

// A thread per eight elements of `item` bytes: from bit planes, block by block, to elements; one
// more thread for the bytes of the last, fewer than eight, elements.
extern "C" __global__ void unshuffle(const u8* planes, i64 whole, i64 block_bytes, i32 item,
                                     const u8* tail, i64 tail_bytes, u8* out) {
  const i64 at = thread_index() * 8 * item;
  if (at == whole) {
    for (i64 i = 0; i < tail_bytes; ++i) out[whole + i] = tail[i];
  }
  if (at >= whole) return;
  const i64 base = at / block_bytes * block_bytes;
  const i64 size = whole - base < block_bytes ? whole - base : block_bytes;
  const i64 groups = size / (8 * item);
  const i64 group = (at - base) / (8 * item);
  for (int b = 0; b < item; ++b) {
    u64 x = 0;
    for (int j = 0; j < 8; ++j) x |= (u64)planes[base + (8 * b + j) * groups + group] << (8 * j);
    // Transpose the 8 x 8 bits of x (Warren, Hacker's Delight, 7-3).
    u64 t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
    x = x ^ t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
    x = x ^ t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
    x = x ^ t ^ (t << 28);
    for (int j = 0; j < 8; ++j) out[at + j * item + b] = (u8)(x >> (8 * j));
  }
}

// A thread per pixel: the other byte order, in place.
extern "C" __global__ void swap_bytes(u8* data, i64 pixels, i32 item) {
  const i64 i = thread_index();
  if (i >= pixels) return;
  u8* p = data + i * item;
  for (int a = 0, b = item - 1; a < b; ++a, --b) {
    const u8 t = p[a];
    p[a] = p[b];
    p[b] = t;
  }
}

// ---- from pixels to cells

// A thread per cell of k x k pixels.
template <typename T>
__device__ static void reduce(const T* pixels, i32 ny, i32 nx, const u8* invalid, i32 masked,
                              i32 k, i32 grid, i64 high, i64 error, i32 negative_is_invalid,
                              u32* maximum, u64* total, u16* count) {
  const i32 across = (nx + k - 1) / k, down = (ny + k - 1) / k;
  const i64 index = thread_index();
  if (index >= (i64)across * down) return;
  const i32 cy = (i32)(index / across), cx = (i32)(index % across);
  i64 best = 0, n = 0;
  u64 added = 0;
  for (i32 y = cy * k; y < ny && y < cy * k + k; ++y) {
    for (i32 x = cx * k; x < nx && x < cx * k + k; ++x) {
      const i64 at = (i64)y * nx + x;
      if (masked && invalid[at]) continue;
      const i64 v = photons(pixels[at], high, error, negative_is_invalid);
      if (v < 0) continue;
      ++n;
      added += (u64)v;
      if (v > best) best = v;
    }
  }
  const i64 out = (i64)cy * grid + cx;
  maximum[out] = (u32)best;
  total[out] = added;
  count[out] = (u16)n;
}

// Sigma by which a cell's maximum exceeds its other pixels, less what chance explains; b is the
// root of the others' mean.
__device__ static float excess(u32 m, u64 s, i32 n, float expected, float* b) {
  const float largest = (float)m;
  const float mean = n > 1 ? (float)(s - m) / (float)(n - 1) : largest;
  *b = sqrtf(mean + 0.375f);
  return 2.0f * (sqrtf(largest + 0.375f) - *b) - expected;
}

// A thread per cell of the grid of each frame: the three float channels.
extern "C" __global__ void overview(const Job* jobs, i32 frames, i32 cells, const u32* maximum,
                                    const u64* total, const u16* count, float* out) {
  const i64 at = thread_index();
  if (at >= (i64)frames * cells) return;
  const i64 frame = at / cells, i = at % cells;
  const i32 n = count[at], k = jobs[frame].k;
  if (n == 0) return;
  float b;
  const float e = excess(maximum[at], total[at], n, jobs[frame].expected, &b);
  out += 3 * frame * cells;
  out[i] = e / sqrtf(1.0f + fabsf(e));
  out[cells + i] = (2.0f * b) / sqrtf(1.0f + 2.0f * b);
  out[2 * (i64)cells + i] = (float)n / (float)(k * k);
}

// A thread per cell of the grid of each frame. sums is (frames, 6, bins): counts, pixels, cells,
// usable cells, spots, and clipped counts, which radial_clipped adds; integers, so the order of the
// additions does not matter.
extern "C" __global__ void radial_sums(const Job* jobs, i32 frames, i32 cells, const u32* maximum,
                                       const u64* total, const u16* count, float spot, i32 bins,
                                       u64* sums) {
  const i64 at = thread_index();
  if (at >= (i64)frames * cells) return;
  const i64 frame = at / cells;
  const Job& job = jobs[frame];
  if (!job.bins) return;
  const i32 bin = ((const i32*)job.bins)[at % cells];
  if (bin < 0) return;
  sums += 6 * frame * bins;
  atomicAdd(sums + 2 * bins + bin, 1ull);
  const i32 n = count[at];
  if (n == 0 || n < job.k * job.k / 2) return;
  atomicAdd(sums + 3 * bins + bin, 1ull);
  float b;
  if (excess(maximum[at], total[at], n, job.expected, &b) > spot) {
    atomicAdd(sums + 4 * bins + bin, 1ull);
    return;
  }
  atomicAdd(sums + bin, total[at]);
  atomicAdd(sums + bins + bin, (u64)n);
}

// A thread per cell of the grid of each frame, after radial_sums: counts of cells without a spot,
// those that stand out of their ring clipped. A cell of fewer pixels has its part of the bound.
extern "C" __global__ void radial_clipped(const Job* jobs, i32 frames, i32 cells,
                                          const u32* maximum, const u64* total, const u16* count,
                                          float spot, double sigma, i32 bins, u64* sums) {
  const i64 at = thread_index();
  if (at >= (i64)frames * cells) return;
  const i64 frame = at / cells;
  const Job& job = jobs[frame];
  if (!job.bins) return;
  const i32 bin = ((const i32*)job.bins)[at % cells];
  const i32 n = count[at], area = job.k * job.k;
  if (bin < 0 || n == 0 || n < area / 2) return;
  float b;
  if (excess(maximum[at], total[at], n, job.expected, &b) > spot) return;
  sums += 6 * frame * bins + bin;
  const double mean = (double)sums[0] * (double)area / (double)sums[bins];
  const u64 most = (u64)(mean + sigma * sqrt(mean + 1.0));
  const u64 bound = most * (u64)n / (u64)area;
  atomicAdd(sums + 5 * (i64)bins, total[at] < bound ? total[at] : bound);
}

// A warp per row of the grid of each frame: how many pixels of a frame are measurements.
extern "C" __global__ void count_valid(i32 grid, const u16* count, u64* valid_px) {
  const i64 row = blockIdx.x;
  u32 n = 0;
  for (i32 x = threadIdx.x; x < grid; x += LANES) n += count[row * grid + x];
  for (int apart = LANES / 2; apart; apart /= 2) n += __shfl_xor_sync(~0u, n, apart);
  if (threadIdx.x == 0) atomicAdd(valid_px + row / grid, (u64)n);
}

// A thread per bin of each frame: mean count, share of usable cells, share of spots, pixels, and
// mean count with clipped cells.
extern "C" __global__ void radial_shares(const u64* sums, i32 frames, i32 bins, float* out) {
  const i64 at = thread_index();
  if (at >= (i64)frames * bins) return;
  const i64 frame = at / bins, i = at % bins;
  sums += 6 * frame * bins;
  out += 5 * frame * bins;
  const u64 pixels = sums[bins + i], cells = sums[2 * bins + i], usable = sums[3 * bins + i];
  if (pixels) out[i] = (float)sums[i] / (float)pixels;
  if (cells) out[bins + i] = (float)usable / (float)cells;
  if (usable) out[2 * bins + i] = (float)sums[4 * bins + i] / (float)usable;
  out[3 * bins + i] = (float)pixels;
  if (pixels) out[4 * bins + i] = (float)sums[5 * bins + i] / (float)pixels;
}

#define NOTHING -3.402823466e+38f  // below the excess of any cell: no valid pixel, or taken already

// A thread per cell of the frames `rows` of a batch: by how much its maximum stands out.
extern "C" __global__ void cell_excess(const Job* jobs, const i32* rows, i32 frames, i32 cells,
                                       const u32* maximum, const u64* total, const u16* count,
                                       float* left) {
  const i64 at = thread_index();
  if (at >= (i64)frames * cells) return;
  const i32 row = rows[at / cells];
  const i64 cell = (i64)row * cells + at % cells;
  float b;
  left[at] = count[cell] ? excess(maximum[cell], total[cell], count[cell], jobs[row].expected, &b)
                         : NOTHING;
}

// Where the largest of n values is, the first of equals. All lanes get it.
__device__ static i32 largest_at(const float* values, i32 n, int lane) {
  float best = NOTHING;
  i32 at = lane < n ? lane : 0;
  for (i32 i = lane; i < n; i += LANES) {
    if (values[i] > best) {
      best = values[i];
      at = i;
    }
  }
  for (int apart = LANES / 2; apart; apart /= 2) {
    const float other = __shfl_xor_sync(~0u, best, apart);
    const i32 other_at = __shfl_xor_sync(~0u, at, apart);
    if (other > best || (other == best && other_at < at)) {
      best = other;
      at = other_at;
    }
  }
  return at;
}

// A warp per row of cells: where its largest value is.
extern "C" __global__ void largest_of_rows(i32 grid, const float* left, i32* largest) {
  const i64 row = blockIdx.x;
  const i32 at = largest_at(left + row * grid, grid, threadIdx.x);
  if (threadIdx.x == 0) largest[row] = at;
}

// A warp per frame of `rows`: top and left pixel of each tile, best first, -1 where there are no
// more. A taken cell takes those around with it, closer than a tile's width. `tops` has room for a
// value per row of cells.
extern "C" __global__ void tile_corners(const Job* jobs, const i32* rows, i32 grid, i32 tiles,
                                        i32 size, float* left, i32* largest, float* tops,
                                        i32* corners) {
  const i64 frame = blockIdx.x;
  const int lane = threadIdx.x;
  const Job job = jobs[rows[frame]];
  const i32 k = job.k, reach = (size + k - 1) / k - 1;
  left += frame * grid * grid;
  largest += frame * grid;
  tops += frame * grid;
  corners += 2 * frame * tiles;
  for (i32 y = lane; y < grid; y += LANES) tops[y] = left[(i64)y * grid + largest[y]];
  __syncwarp();
  for (i32 tile = 0; tile < tiles; ++tile) {
    const i32 y = largest_at(tops, grid, lane), x = largest[y];
    const bool none = tops[y] == NOTHING;
    if (lane == 0) {
      i32 top = y * k + k / 2 - size / 2, side = x * k + k / 2 - size / 2;
      top = top < job.ny - size ? top : job.ny - size;
      side = side < job.nx - size ? side : job.nx - size;
      corners[2 * tile] = none ? -1 : top > 0 ? top : 0;
      corners[2 * tile + 1] = none ? -1 : side > 0 ? side : 0;
    }
    if (none) continue;
    const i32 y_end = y + reach < grid ? y + reach + 1 : grid;
    const i32 x_first = x > reach ? x - reach : 0;
    const i32 x_end = x + reach < grid ? x + reach + 1 : grid;
    for (i32 row = y > reach ? y - reach : 0; row < y_end; ++row) {
      float* cells = left + (i64)row * grid;
      for (i32 i = x_first + lane; i < x_end; i += LANES) cells[i] = NOTHING;
      __syncwarp();
      const i32 at = largest_at(cells, grid, lane);
      if (lane == 0) {
        largest[row] = at;
        tops[row] = cells[at];
      }
    }
    __syncwarp();
  }
}

// A thread per pixel of a tile: root of the count, and validity.
template <typename T>
__device__ static void crop(const T* pixels, i32 ny, i32 nx, const u8* invalid, i32 masked,
                            const i32* corners, i32 places, i32 size, i64 high, i64 error,
                            i32 negative_is_invalid, float* out) {
  const i64 index = thread_index();
  const i64 area = (i64)size * size;
  if (index >= places * area) return;
  const i64 place = index / area, at = index % area;
  if (corners[2 * place] < 0) return;
  const i32 y = corners[2 * place] + (i32)(at / size);
  const i32 x = corners[2 * place + 1] + (i32)(at % size);
  if (y >= ny || x >= nx) return;
  const i64 from = (i64)y * nx + x;
  if (masked && invalid[from]) return;
  const i64 v = photons(pixels[from], high, error, negative_is_invalid);
  if (v < 0) return;
  out[2 * place * area + at] = sqrtf((float)v);
  out[(2 * place + 1) * area + at] = 1.0f;
}

#define FOR_PIXEL_TYPE(NAME, T)                                                                  \
  extern "C" __global__ void reduce_##NAME(                                                      \
      const T* pixels, i32 ny, i32 nx, const u8* invalid, i32 masked, i32 k, i32 grid, i64 high, \
      i64 error, i32 negative_is_invalid, u32* maximum, u64* total, u16* count) {                \
    reduce(pixels, ny, nx, invalid, masked, k, grid, high, error, negative_is_invalid, maximum,  \
           total, count);                                                                        \
  }                                                                                              \
  extern "C" __global__ void crop_##NAME(                                                        \
      const T* pixels, i32 ny, i32 nx, const u8* invalid, i32 masked, const i32* corners,        \
      i32 places, i32 size, i64 high, i64 error, i32 negative_is_invalid, float* out) {          \
    crop(pixels, ny, nx, invalid, masked, corners, places, size, high, error,                    \
         negative_is_invalid, out);                                                              \
  }

FOR_PIXEL_TYPE(u1, u8)
FOR_PIXEL_TYPE(u2, u16)
FOR_PIXEL_TYPE(u4, u32)
FOR_PIXEL_TYPE(i1, i8)
FOR_PIXEL_TYPE(i2, i16)
FOR_PIXEL_TYPE(i4, i32)
FOR_PIXEL_TYPE(f4, float)
