// Shared by the kernels: float32 and bfloat16, SIMD vectors, non-temporal stores, images.
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

// -------------------------------------------------------------------------------------------------
// float32 and bfloat16

struct bfloat16 { uint16_t bits; };

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float* at, float value) { *at = value; }

inline void store(bfloat16* at, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;      // to nearest, ties to even
    uint32_t nan = (bits >> 16) | 0x40;         // rounding could turn a NaN into infinity
    at->bits = uint16_t(value == value ? rounded : nan);
}

// -------------------------------------------------------------------------------------------------
// vectors

#ifdef __AVX512F__
const long LANES = 16;              // floats per vector
#else
const long LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec vload(const float* at) { return *(const vec*)at; }
inline void vstore(float* at, vec values) { *(vec*)at = values; }

inline long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Calls work(group size, first channel) for groups of channels; sizes are powers of two up to MAX.
template <long MAX, class Work>
inline void for_groups(long channels, Work work, long c = 0) {
    for (; c + MAX <= channels; c += MAX) work(std::integral_constant<long, MAX>(), c);
    if constexpr (MAX > 1) for_groups<MAX / 2>(channels, work, c);
}

// Floats, zero at first, aligned to cache lines.
class Buffer {
    struct alignas(64) Line { float values[16]; };
    std::vector<Line> lines;

public:
    explicit Buffer(long n) : lines(n / 16 + 1) {}
    float* at(long i) { return &lines[0].values[0] + i; }
    const float* at(long i) const { return &lines[0].values[0] + i; }
};

// -------------------------------------------------------------------------------------------------
// non-temporal (streaming) stores

// Outputs of at least this many bytes bypass the caches: they would evict everything else before
// they are read again, and a line that is written as a whole need not be read from memory first.
const long STREAM_BYTES = 1 << 22;

// Non-temporal store of one vector; `at` must be aligned to the vector size.
inline void stream_store(float* at, vec values) {
#if defined(__AVX512F__)
    _mm512_stream_ps(at, (__m512)values);
#elif defined(__AVX__)
    _mm256_stream_ps(at, (__m256)values);
#else
    vstore(at, values);
#endif
}

// memcpy by non-temporal stores if `to` and `bytes` are multiples of 32.
inline void stream_copy(const void* from, void* to, long bytes) {
#ifdef __AVX__
    if (bytes % 32 == 0 && uintptr_t(to) % 32 == 0) {
        for (long i = 0; i < bytes; i += 32)
            _mm256_stream_si256((__m256i*)((char*)to + i),
                                _mm256_loadu_si256((const __m256i*)((const char*)from + i)));
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

// Makes this thread's non-temporal stores visible to other threads.
inline void stream_fence() {
#ifdef __AVX__
    _mm_sfence();
#endif
}

// -------------------------------------------------------------------------------------------------
// images

// (count, height, width, channels) contiguous, that is, NHWC. With scale and shift, (channels), the
// kernels read leaky_relu(scale x + shift) instead of x.
struct Images {
    const float* values;
    long count, height, width, channels;
    const float *scale = nullptr, *shift = nullptr;
    float slope = 1;                                    // of the LeakyReLU
};

// Software prefetch, one vector per call, interleaved with arithmetic: a burst would stall it.
struct Prefetch {
    const float *at = nullptr, *end = nullptr;

    void next() {
        if (at < end) __builtin_prefetch(at, 0, 2);
        at += LANES;
    }
};

// Prefetches `count` lines from line `first` on, counted over all images; stops at the last one.
inline Prefetch prefetch_lines(const Images& images, long first, long count) {
    const long line = images.width * images.channels, all = images.count * images.height;
    const long end = first + count < all ? first + count : all;
    return {images.values + first * line, images.values + end * line};
}
