// From a compressed frame to cells, views and tiles. The CPU twins are lz4.py and cpu.py.
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

#ifndef LANES
#define LANES 32  // threads that work on one compressed block: a warp
#endif

#define CORRUPT_BLOCK 3  // see FAULTS in payload.py
#define WRONG_SIZE 4

__device__ static i64 thread_index() {
  return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

// ---- decoding

// One LZ4 block src[s, s_end) to dst[d, d_end); bytes written, or -1. All lanes take the same
// path; they share the copying.
__device__ static i64 lz4_block(const u8* src, i64 s, i64 s_end, u8* dst, i64 d, i64 d_end,
                                int lane) {
  const i64 begin = d;
  while (s < s_end) {
    const int token = src[s++];
    i64 literals = token >> 4;
    if (literals == 15) {
      int more;
      do {
        if (s >= s_end) return -1;
        more = src[s++];
        literals += more;
      } while (more == 255);
    }
    if (literals > s_end - s || literals > d_end - d) return -1;
    for (i64 i = lane; i < literals; i += LANES) dst[d + i] = src[s + i];
    s += literals;
    d += literals;
    if (s == s_end) return d - begin;  // the last sequence is literals alone
    if (s_end - s < 2) return -1;
    const i64 offset = src[s] | ((i64)src[s + 1] << 8);
    s += 2;
    if (offset == 0 || offset > d - begin) return -1;
    i64 length = token & 15;
    if (length == 15) {
      int more;
      do {
        if (s >= s_end) return -1;
        more = src[s++];
        length += more;
      } while (more == 255);
    }
    length += 4;
    if (length > d_end - d) return -1;
    __syncwarp();  // what the other lanes wrote so far is read below
    const u8* from = dst + d - offset;
    if (offset >= length) {
      for (i64 i = lane; i < length; i += LANES) dst[d + i] = from[i];
    } else {
      // The match overlaps its own output, so it repeats with the period of its offset.
      for (i64 i = lane; i < length; i += LANES) dst[d + i] = from[i % offset];
    }
    d += length;
  }
  return -1;
}

// A warp per block. fault receives 8 * block + code of the first block that fails.
extern "C" __global__ void decode_blocks(const u8* src, const i64* starts, const i32* lengths,
                                         i64 blocks, i64 block_bytes, i64 whole, i32 stored,
                                         u8* dst, u64* fault) {
  const i64 block = thread_index() / LANES;
  const int lane = (int)(thread_index() % LANES);
  if (block >= blocks) return;
  const i64 at = block * block_bytes;
  const i64 size = whole - at < block_bytes ? whole - at : block_bytes;
  const i64 s = starts[block], length = lengths[block];
  if (stored && length == size) {
    for (i64 i = lane; i < size; i += LANES) dst[at + i] = src[s + i];
    return;
  }
  const i64 written = lz4_block(src, s, s + length, dst, at, at + size, lane);
  if (written != size && lane == 0) {
    atomicMin(fault, 8ull * (u64)block + (written < 0 ? CORRUPT_BLOCK : WRONG_SIZE));
  }
}

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

// ---- reducing

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

// A thread per cell of the grid: the three float channels.
extern "C" __global__ void overview(const u32* maximum, const u64* total, const u16* count,
                                    i32 cells, i32 k, float expected, float* out) {
  const i64 i = thread_index();
  if (i >= cells) return;
  const i32 n = count[i];
  if (n == 0) return;
  float b;
  const float e = excess(maximum[i], total[i], n, expected, &b);
  out[i] = e / sqrtf(1.0f + fabsf(e));
  out[cells + i] = (2.0f * b) / sqrtf(1.0f + 2.0f * b);
  out[2 * (i64)cells + i] = (float)n / (float)(k * k);
}

// A thread per cell of the grid. sums is (5, bins): counts, pixels, cells, usable cells and spots;
// integers, so the order of the additions does not matter.
extern "C" __global__ void radial_sums(const u32* maximum, const u64* total, const u16* count,
                                       const i32* bin_of_cell, i32 cells, i32 k, float expected,
                                       float spot, i32 bins, u64* sums) {
  const i64 i = thread_index();
  if (i >= cells) return;
  const i32 bin = bin_of_cell[i];
  if (bin < 0) return;
  atomicAdd(sums + 2 * bins + bin, 1ull);
  const i32 n = count[i];
  if (n == 0 || n < k * k / 2) return;
  atomicAdd(sums + 3 * bins + bin, 1ull);
  float b;
  if (excess(maximum[i], total[i], n, expected, &b) > spot) {
    atomicAdd(sums + 4 * bins + bin, 1ull);
    return;
  }
  atomicAdd(sums + bin, total[i]);
  atomicAdd(sums + bins + bin, (u64)n);
}

// A thread per bin: mean count, share of usable cells, share of spots.
extern "C" __global__ void radial_shares(const u64* sums, i32 bins, float* out) {
  const i64 i = thread_index();
  if (i >= bins) return;
  const u64 pixels = sums[bins + i], cells = sums[2 * bins + i], usable = sums[3 * bins + i];
  if (pixels) out[i] = (float)sums[i] / (float)pixels;
  if (cells) out[bins + i] = (float)usable / (float)cells;
  if (usable) out[2 * bins + i] = (float)sums[4 * bins + i] / (float)usable;
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
