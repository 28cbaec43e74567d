// Follows the kernels in a build for the host under sanitizers: mutated payloads through both ways
// from blocks to cells. Every buffer is as large as the kernels are told and no larger, so that a
// sanitizer sees any access outside of it; and both ways must give the same faults and cells.
//
// Arguments: a file of good payloads as test_cuda_fuzz.py writes it, how many mutations, a seed.
#include <cstring>
#include <random>
#include <vector>

struct Good {
  i32 item, is_signed, ny, nx, k, grid, block_bytes, whole, bytes;
};

static std::mt19937_64 chance;
static u64 below(u64 n) { return chance() % n; }

template <typename T>
static T* exactly(size_t n) {
  return (T*)calloc(n ? n * sizeof(T) : 1, 1);
}

static std::vector<u8> mutated(std::vector<u8> data) {
  for (u64 changes = 1 + below(3); changes && data.size() > 1; --changes) {
    const size_t at = below(data.size());
    static const u8 telling[] = {0, 1, 0x0F, 0xF0, 0xFF, 0x10, 0x4F};
    switch (below(6)) {
      case 0: data[at] = (u8)below(256); break;
      case 1: data[at] ^= (u8)(1 << below(8)); break;
      case 2: data[at] = telling[below(sizeof telling)]; break;
      case 3:
        data.erase(data.begin() + at, data.begin() + at + below(data.size() - at < 20
                                                                    ? data.size() - at
                                                                    : 20));
        break;
      case 4: data.insert(data.begin() + at, 1 + below(8), (u8)below(256)); break;
      default: {
        const size_t from = below(data.size());
        for (size_t i = 0; i < 16 && at + i < data.size() && from + i < data.size(); ++i) {
          data[at + i] = data[from + i];
        }
      }
    }
  }
  return data;
}

static void need(bool fine, const char* what) {
  if (!fine) {
    fprintf(stderr, "fuzz: %s\n", what);
    exit(1);
  }
}

// What the host does before any kernel: where the blocks are. False: the payload is refused.
static bool spans_of(const std::vector<u8>& data, const Good& good, i64 tail,
                     std::vector<Span>* spans) {
  size_t at = 0;
  const i64 blocks = (good.whole + good.block_bytes - 1) / good.block_bytes;
  for (i64 i = 0; i < blocks; ++i) {
    if (data.size() - at < 4) return false;
    const u32 length = (u32)data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3];
    at += 4;
    if (length > data.size() - at) return false;
    spans->push_back({(i64)at, (i32)length, 0});
    at += length;
  }
  if (!blocks) spans->push_back({0, 0, 0});
  return data.size() - at == (size_t)tail;
}

// One block mutated, its length told as it now is: what the host cannot see is wrong.
static std::vector<u8> mutated_block(const std::vector<u8>& data, const Good& good, i64 tail) {
  std::vector<Span> spans;
  need(spans_of(data, good, tail, &spans), "a good payload is refused");
  const Span& span = spans[below(spans.size())];
  if (!good.whole) return mutated(data);
  const auto begin = data.begin() + span.start;
  std::vector<u8> block = mutated({begin, begin + span.length});
  if (!below(4)) block.resize(below(block.size() + 1));
  std::vector<u8> out(data.begin(), begin - 4);
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back((u8)(block.size() >> shift));
  out.insert(out.end(), block.begin(), block.end());
  out.insert(out.end(), begin + span.length, data.end());
  return out;
}

struct Cells {
  u32* maximum;
  u64* total;
  u16* count;
  u64 fault;

  explicit Cells(size_t n)
      : maximum(exactly<u32>(n)), total(exactly<u64>(n)), count(exactly<u16>(n + n % 2)),
        fault(~0ull) {}
  ~Cells() {
    free(maximum);
    free(total);
    free(count);
  }
};

template <typename T, typename Reduce>
static void decode_and_reduce(const Good& good, const Job& job, const u8* data, i64 size,
                              const std::vector<Span>& spans, Reduce reduce, Cells* cells) {
  const i64 pixels = (i64)good.ny * good.nx, tail = pixels * good.item - good.whole;
  u8* planes = exactly<u8>(good.whole);
  u8* out = exactly<u8>(pixels * good.item);
  u8 none = 0;
  if (good.whole) {
    launch_decode_blocks((u32)spans.size(), LANES, 0, data, spans.data(), good.block_bytes,
                         good.whole, 0, planes, &cells->fault);
  }
  launch_unshuffle((u32)(pixels / 8 + 1), 1, 0, planes, good.whole, good.block_bytes, good.item,
                   data + size - tail, tail, out);
  reduce((u32)pixels, 1, 0, (const T*)out, good.ny, good.nx, &none, 0, good.k, good.grid, job.high,
         job.error, job.negative_is_invalid, cells->maximum, cells->total, cells->count);
  free(planes);
  free(out);
}

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  need(file, "no file of payloads");
  std::vector<std::pair<Good, std::vector<u8>>> corpus;
  Good head;
  while (fread(&head, sizeof head, 1, file) == 1) {
    std::vector<u8> bytes(head.bytes);
    need(fread(bytes.data(), 1, bytes.size(), file) == bytes.size(), "half a payload");
    corpus.push_back({head, bytes});
  }
  fclose(file);
  const long rounds = atol(arguments[2]);
  chance.seed(strtoull(arguments[3], nullptr, 10));
  long refused = 0, faulty = 0, fine = 0;
  for (long round = 0; round < rounds; ++round) {
    const auto& [good, bytes] = corpus[below(corpus.size())];
    const i64 pixels = (i64)good.ny * good.nx, tail = pixels * good.item - good.whole;
    const std::vector<u8> payload =
        below(4) ? mutated_block(bytes, good, tail) : mutated(bytes);
    std::vector<Span> spans;
    if (!spans_of(payload, good, tail, &spans)) {
      ++refused;
      continue;
    }
    u8* data = exactly<u8>(payload.size());
    memcpy(data, payload.data(), payload.size());
    Job job{};
    job.high = (1ll << (8 * good.item - good.is_signed)) - 3;
    job.error = -(1ll << 62);
    job.tail = (i64)payload.size() - tail;
    job.whole = good.whole;
    job.block_bytes = good.block_bytes;
    job.item = good.item;
    job.is_signed = job.negative_is_invalid = good.is_signed;
    job.ny = good.ny;
    job.nx = good.nx;
    job.k = good.k;
    const size_t cells = (size_t)good.grid * good.grid;
    Cells fused(cells), apart(cells);
    const i32 block = good.block_bytes < good.whole ? good.block_bytes : good.whole;
    const u32 shared = 4 * (8 * good.item * ((block / good.item + 31) / 32) + 2);
    const auto launch = good.item == 1   ? launch_reduce_blocks_8
                        : good.item == 2 ? launch_reduce_blocks_16
                                         : launch_reduce_blocks_32;
    launch((u32)spans.size(), LANES, shared, data, spans.data(), &job, good.grid, fused.maximum,
           fused.total, fused.count, &fused.fault);
    const i64 size = (i64)payload.size();
    if (good.item == 1) {
      decode_and_reduce<u8>(good, job, data, size, spans, launch_reduce_u1, &apart);
    } else if (good.item == 2 && good.is_signed) {
      decode_and_reduce<i16>(good, job, data, size, spans, launch_reduce_i2, &apart);
    } else if (good.item == 2) {
      decode_and_reduce<u16>(good, job, data, size, spans, launch_reduce_u2, &apart);
    } else {
      decode_and_reduce<u32>(good, job, data, size, spans, launch_reduce_u4, &apart);
    }
    need(fused.fault == apart.fault, "other faults");
    if (fused.fault == ~0ull) {
      need(!memcmp(fused.maximum, apart.maximum, cells * sizeof(u32)), "other maxima");
      need(!memcmp(fused.total, apart.total, cells * sizeof(u64)), "other sums");
      need(!memcmp(fused.count, apart.count, cells * sizeof(u16)), "other counts");
      ++fine;
    } else {
      ++faulty;
    }
    free(data);
  }
  printf("%ld %ld %ld\n", refused, faulty, fine);
  return 0;
}
