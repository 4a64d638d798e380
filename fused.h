// What the kernels share: float32 and bfloat16, vectors, writing past the caches, images.
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
    uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline void store(float* at, float value) { *at = value; }

inline void store(bfloat16* at, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;      // to nearest, ties to even
    uint32_t nan = (wide >> 16) | 0x40;         // rounding must not make a number of it
    at->bits = uint16_t(value == value ? rounded : nan);
}

// -------------------------------------------------------------------------------------------------
// vectors

#ifdef __AVX512F__
const long LANES = 16;              // values of a vector
#else
const long LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec get(const float* at) { return *(const vec*)at; }
inline void put(float* at, vec values) { *(vec*)at = values; }

inline long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Calls work(number of channels, first channel) with up to MOST channels at once, a power of two.
template <long MOST, class Work>
inline void in_groups(long channels, Work work, long c = 0) {
    for (; c + MOST <= channels; c += MOST) work(std::integral_constant<long, MOST>(), c);
    if constexpr (MOST > 1) in_groups<MOST / 2>(channels, work, c);
}

// Floats from a place on that whole vectors can be read from at once.
class Buffer {
    struct alignas(64) Line { float values[16]; };
    std::vector<Line> lines;

public:
    explicit Buffer(long n) : lines(n / 16 + 1) {}
    float* at(long i) { return &lines[0].values[0] + i; }
    const float* at(long i) const { return &lines[0].values[0] + i; }
};

// -------------------------------------------------------------------------------------------------
// past the caches

// What is larger than the caches is read again much later, so it needs no room in them; and a line
// of memory that is written as a whole need not be read before. Results of so many bytes are far.
const long FAR = 1 << 22;

// Writes past the caches, to a place that is a multiple of a vector.
inline void put_far(float* at, vec values) {
#if defined(__AVX512F__)
    _mm512_stream_ps(at, (__m512)values);
#elif defined(__AVX__)
    _mm256_stream_ps(at, (__m256)values);
#else
    put(at, values);
#endif
}

// Copies bytes past the caches, if whole vectors fit in.
inline void copy_far(const void* from, void* to, long bytes) {
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

// Waits until other threads may see all that this one has written past the caches.
inline void wait_for_far() {
#ifdef __AVX__
    _mm_sfence();
#endif
}

// -------------------------------------------------------------------------------------------------
// images

// (count, height, width, channels), one pixel after the other
struct Images {
    const float* values;
    long count, height, width, channels;
    const float *scale = nullptr, *shift = nullptr;     // (channels), if it is to be normalised
    float slope = 1;                                    // of the LeakyReLU after that
};

// Asks for memory bit by bit between sums, so that it is near when it is read. All at once would
// block them.
struct Ahead {
    const float *next = nullptr, *end = nullptr;

    void ask() {
        if (next < end) __builtin_prefetch(next, 0, 2);
        next += LANES;
    }
};

// some of the lines of all images, as many as there are
inline Ahead lines_ahead(const Images& images, long first, long count) {
    const long line = images.width * images.channels, all = images.count * images.height;
    const long end = first + count < all ? first + count : all;
    return {images.values + first * line, images.values + end * line};
}
