// What the kernels share: float32 and bfloat16, and writing past the caches.
#include <cstdint>
#include <cstring>
#ifdef __AVX__
#include <immintrin.h>
#endif

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

// What is larger than the caches is read again much later, so it needs no room in them; and a line
// of memory that is written as a whole need not be read before. Results of so many bytes are far.
const long FAR = 1 << 22;

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
