// Stores matrices into packed ones (matrix.h): from memory, or straight from a file, each byte read once. Those that
// stay where they lie (rows.h) are brought into memory and searched for what is no finite number.
//
// Sixteen rows at a time go through a buffer that stays in the second-level cache: read, converted to the packed type,
// searched for what is no finite number, and turned round in registers. Rounding is to nearest, ties to even.
// The C interface is mirrored in engine/cpu/library.py.

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "matrix.h"

namespace pdmesh {

enum class Encoding : int32_t { kFloat32, kBFloat16, kFloat16 };

// Where a matrix lies: rows of values, `row_bytes` apart, the first at `offset` of a file or at an address (file: -1).
struct Source {
  int32_t file;
  Encoding encoding;
  int64_t offset, row_bytes;
};

// What packing returns; above zero, it is what the system says of the file (errno).
enum Status : int64_t { kPacked = 0, kNotFinite = -1, kCutShort = -2 };

constexpr int kRows = 16;
// Of a row that is cut, pieces of so many values: whole vectors of every type.
constexpr int64_t kPieceUnit = 32;
constexpr int64_t kBufferBytes = 256 * 1024;

inline __mmask32 first(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << std::max<int64_t>(count, 0)) - 1; }

// The next `count` values of a row as float32 bits, 16 at most, with zeros behind them.
template <Encoding encoding>
inline u32x16 float_bits(const char* from, int64_t count) {
  const __mmask16 wanted = first(std::min<int64_t>(count, 16));
  if constexpr (encoding == Encoding::kFloat32) return (u32x16)_mm512_maskz_loadu_epi32(wanted, from);
  const __m256i halves = _mm256_maskz_loadu_epi16(wanted, from);
  if constexpr (encoding == Encoding::kFloat16) return (u32x16)_mm512_cvtph_ps(halves);
  return (u32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

// Adds to `found` where a value is, or would round to, what is not finite.
template <uint32_t limit>
inline void note_infinite(u32x16 bits, uint32_t& found) {
  const __m512i size = _mm512_and_si512((__m512i)bits, _mm512_set1_epi32(0x7fffffff));
  found |= _mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(limit));
}

// The next 16 four-byte units of a packed row, from `count` values.
template <class Element, Encoding encoding>
inline __m512i units(const char* from, int64_t count, uint32_t& infinite) {
  if constexpr (Element::kPack == 1) {
    const u32x16 bits = float_bits<encoding>(from, count);
    note_infinite<0x7f800000u>(bits, infinite);
    return (__m512i)bits;
  } else if constexpr (encoding == Encoding::kBFloat16) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(first(count), from);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
    return pairs;
  } else {
    constexpr int64_t kHalfBytes = encoding == Encoding::kFloat32 ? 64 : 32;
    __m256i halves[2];
    for (int i = 0; i < 2; ++i) {
      const u32x16 bits = float_bits<encoding>(from + i * kHalfBytes, count - 16 * i);
      note_infinite<0x7f7f8000u>(bits, infinite);
      const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      halves[i] = _mm512_cvtepi32_epi16((__m512i)rounded);
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
  }
}

// Rows become columns.
inline void transpose(__m512i (&rows)[kRows]) {
  __m512i other[kRows];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
    }
  // rows[4 a + b] holds, in each of its four quarters q, column 4 q + b of rows 4 a to 4 a + 3.
  for (int b = 0; b < 4; ++b) {
    const __m512i low02 = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(rows[b], rows[4 + b], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(rows[8 + b], rows[12 + b], 0xdd);
    other[b] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    other[8 + b] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    other[4 + b] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    other[12 + b] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
  for (int i = 0; i < kRows; ++i) rows[i] = other[i];
}

template <class Element, Encoding encoding>
class MatrixPacker {
 public:
  MatrixPacker(typename Element::Value* packed, int64_t k, const int64_t* rows, int64_t num_columns,
               const Source& source)
      : packed_(reinterpret_cast<char*>(packed)),
        k_(k),
        num_steps_((k + Element::kPack - 1) / Element::kPack),
        rows_(rows),
        num_groups_((num_columns + kRows - 1) / kRows),
        num_columns_(num_columns),
        source_(source),
        num_pieces_(std::max<int64_t>(1, (k * kRows * kValueBytes + kBufferBytes - 1) / kBufferBytes)),
        piece_((k / num_pieces_ / kPieceUnit + 1) * kPieceUnit) {}

  int64_t run(int num_threads) {
    run_team(num_threads, [&](Team& team) {
      std::vector<char> buffer(source_.file < 0 ? 0 : kRows * piece_ * kValueBytes);
      team.for_each(num_groups_ * num_pieces_, [&](int64_t item) {
        if (status_.load(std::memory_order_relaxed) != kPacked) return;
        const int64_t status = pack(item / num_pieces_, item % num_pieces_ * piece_, buffer.data());
        if (status != kPacked) status_.store(status, std::memory_order_relaxed);
      });
    });
    return status_;
  }

 private:
  static constexpr int64_t kValueBytes = encoding == Encoding::kFloat32 ? 4 : 2;
  static constexpr int64_t kStepBytes = 4 * kPanel;

  // Sixteen columns of the packed matrix, of `piece_` values from `first_value` on.
  int64_t pack(int64_t group, int64_t first_value, char* buffer) {
    const int64_t num_values = std::min(piece_, k_ - first_value);
    if (num_values <= 0) return kPacked;
    const char* from[kRows] = {};
    __mmask16 wanted = 0;
    for (int i = 0; i < kRows; ++i)
      if (kRows * group + i < num_columns_ && rows_[kRows * group + i] >= 0) wanted |= 1u << i;
    if (!wanted) return kPacked;
    const int64_t status = fetch(rows_ + kRows * group, wanted, first_value, num_values, buffer, from);
    if (status != kPacked) return status;
    char* to = packed_ + group / 2 * num_steps_ * kStepBytes + group % 2 * (kStepBytes / 2);
    uint32_t infinite = 0;
    for (int64_t done = 0; done < num_values; done += 16 * Element::kPack) {
      __m512i block[kRows];
      for (int i = 0; i < kRows; ++i)
        block[i] = wanted >> i & 1 ? units<Element, encoding>(from[i] + done * kValueBytes, num_values - done, infinite)
                                   : _mm512_setzero_si512();
      transpose(block);
      const int64_t step = (first_value + done) / Element::kPack;
      const int64_t num_units = std::min<int64_t>(16, num_steps_ - step);
      for (int64_t unit = 0; unit < num_units; ++unit) {
        char* line = to + (step + unit) * kStepBytes;
        // Whole lines go past the caches: nobody reads them soon.
        if (wanted == 0xffff)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(line), block[unit]);
        else
          _mm512_mask_storeu_epi32(line, wanted, block[unit]);
      }
    }
    _mm_sfence();
    return infinite ? kNotFinite : kPacked;
  }

  // Where those of 16 rows that are wanted lie in memory; of a file, in the buffer.
  int64_t fetch(const int64_t* rows, __mmask16 wanted, int64_t first_value, int64_t num_values, char* buffer,
                const char* (&from)[kRows]) const {
    const int64_t offset = source_.offset + first_value * kValueBytes, size = num_values * kValueBytes;
    for (int i = 0; i < kRows;) {
      if (!(wanted >> i & 1)) {
        ++i;
        continue;
      }
      if (source_.file < 0) {
        from[i] = reinterpret_cast<const char*>(offset + rows[i] * source_.row_bytes);
        ++i;
        continue;
      }
      // Rows that lie one after the other come in one piece.
      int end = i + 1;
      if (size == source_.row_bytes)
        while (end < kRows && wanted >> end & 1 && rows[end] == rows[end - 1] + 1) ++end;
      const int64_t status = read(buffer + i * size, (end - i) * size, offset + rows[i] * source_.row_bytes);
      if (status != kPacked) return status;
      for (; i < end; ++i) from[i] = buffer + i * size;
    }
    return kPacked;
  }

  int64_t read(char* to, int64_t num_bytes, int64_t offset) const {
    while (num_bytes > 0) {
      const ssize_t got = pread(source_.file, to, num_bytes, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return got < 0 ? errno : kCutShort;
      to += got, offset += got, num_bytes -= got;
    }
    return kPacked;
  }

  char* packed_;
  const int64_t k_, num_steps_;
  const int64_t* rows_;
  const int64_t num_groups_, num_columns_;
  const Source source_;
  const int64_t num_pieces_, piece_;
  std::atomic<int64_t> status_{kPacked};
};

template <class Element>
int64_t pack(typename Element::Value* packed, int64_t k, const int64_t* rows, int64_t num_columns, const Source& source,
             int num_threads) {
  switch (source.encoding) {
    case Encoding::kFloat32:
      return MatrixPacker<Element, Encoding::kFloat32>(packed, k, rows, num_columns, source).run(num_threads);
    case Encoding::kBFloat16:
      return MatrixPacker<Element, Encoding::kBFloat16>(packed, k, rows, num_columns, source).run(num_threads);
    case Encoding::kFloat16:
      return MatrixPacker<Element, Encoding::kFloat16>(packed, k, rows, num_columns, source).run(num_threads);
  }
  return EINVAL;
}

// Of rows in a mapped file, a piece that one thread reads.
constexpr int64_t kReadBytes = 1 << 20;
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, which older headers lack

// Whole pages of a mapped file.
struct Pages {
  char* begin;
  int64_t num_bytes;

  Pages(const char* from, int64_t size)
      : begin(reinterpret_cast<char*>(uintptr_t(from) / page_bytes() * page_bytes())), num_bytes(from + size - begin) {}

  static uintptr_t page_bytes() {
    static const uintptr_t bytes = uintptr_t(sysconf(_SC_PAGESIZE));
    return bytes;
  }

  // Whether the system has them in its cache, as far as samples tell.
  bool are_cached() const {
    unsigned char present = 0;
    for (int64_t offset = 0; offset < num_bytes; offset += kReadBytes)
      if (mincore(begin + offset, page_bytes(), &present) != 0 || !(present & 1)) return false;
    return true;
  }

  // Has the disk read them. Touching them would end the process where the disk cannot give them.
  int64_t bring() const {
    while (madvise(begin, num_bytes, kPopulateRead) != 0)
      // Linux before 5.14 knows no such advice: pages come as they are used.
      if (errno != EINTR && errno != EAGAIN) return errno == EINVAL ? kPacked : errno == EFAULT ? EIO : errno;
    return kPacked;
  }
};

// Not 0 where one of `count` values is not finite.
template <class Element, Encoding encoding>
inline uint32_t search(const char* from, int64_t count) {
  constexpr int64_t kVectorValues = 16 * Element::kPack;
  uint32_t infinite = 0;
  int64_t i = 0;
  for (; i + 4 * kVectorValues <= count; i += 4 * kVectorValues, from += 256)
    for (int j = 0; j < 4; ++j) units<Element, encoding>(from + 64 * j, kVectorValues, infinite);
  for (; i < count; i += kVectorValues, from += 64) units<Element, encoding>(from, count - i, infinite);
  return infinite;
}

// Brings rows of k values into memory, and searches them.
template <class Element>
int64_t check_rows(const char* rows, int64_t num_rows, int64_t row_bytes, int64_t k, int num_threads) {
  constexpr Encoding kEncoding = Element::kPack == 1 ? Encoding::kFloat32 : Encoding::kBFloat16;
  constexpr int64_t kValueBytes = 4 / Element::kPack;
  const int64_t rows_each = std::max<int64_t>(1, kReadBytes / row_bytes);
  const Pages all(rows, num_rows * row_bytes);
  // By one thread, in order: then the system reads far ahead, and takes memory in large pieces, which are mapped many
  // times faster, now and later. What is cached comes fastest as it is touched.
  std::atomic<int64_t> status{all.are_cached() ? int64_t(kPacked) : all.bring()};
  run_team(num_threads, [&](Team& team) {
    team.for_each((num_rows + rows_each - 1) / rows_each, [&](int64_t item) {
      if (status.load(std::memory_order_relaxed) != kPacked) return;
      const char* begin = rows + item * rows_each * row_bytes;
      const char* last = rows + (std::min(num_rows, (item + 1) * rows_each) - 1) * row_bytes;
      uint32_t infinite = 0;
      if (k * kValueBytes == row_bytes) {
        infinite = search<Element, kEncoding>(begin, (last - begin) / kValueBytes + k);
      } else {
        for (const char* row = begin; row <= last; row += row_bytes) infinite |= search<Element, kEncoding>(row, k);
      }
      if (infinite) status.store(kNotFinite, std::memory_order_relaxed);
    });
  });
  return status;
}

}  // namespace pdmesh

extern "C" {

// Brings `num_rows` rows of k values, `row_bytes` apart in a mapped file, into memory, and says whether all are finite.
int64_t pdmesh_check_rows_float32(const char* rows, int64_t num_rows, int64_t row_bytes, int64_t k,
                                  int32_t num_threads) {
  return pdmesh::check_rows<pdmesh::Float32>(rows, num_rows, row_bytes, k, num_threads);
}

int64_t pdmesh_check_rows_bfloat16(const char* rows, int64_t num_rows, int64_t row_bytes, int64_t k,
                                   int32_t num_threads) {
  return pdmesh::check_rows<pdmesh::BFloat16>(rows, num_rows, row_bytes, k, num_threads);
}

// Stores rows of a matrix with k columns into a packed one, which begins with a cache line: row rows[i] becomes its
// column i, for num_columns from the panel at `packed` on; where rows[i] is negative, the column is left as it is.
int64_t pdmesh_pack_float32(float* packed, int64_t k, const int64_t* rows, int64_t num_columns,
                            const pdmesh::Source* source, int32_t num_threads) {
  return pdmesh::pack<pdmesh::Float32>(packed, k, rows, num_columns, *source, num_threads);
}

int64_t pdmesh_pack_bfloat16(uint16_t* packed, int64_t k, const int64_t* rows, int64_t num_columns,
                             const pdmesh::Source* source, int32_t num_threads) {
  return pdmesh::pack<pdmesh::BFloat16>(packed, k, rows, num_columns, *source, num_threads);
}
}
