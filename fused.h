// float32 and bfloat16, for fused.cpp and thin.cpp.
#include <cstdint>
#include <cstring>

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
