// Pooling of images (height, width, channels), one pixel after the other, for fused.py.

#include "fused.h"

namespace {

// (lines, tall, pixels, wide, channels) -> (lines, pixels, channels). `from` tells which of the
// values was the largest, and is null for the mean.
template <class T>
void pool(const T* x, T* y, uint8_t* from, long lines, long tall, long pixels, long wide,
          long channels) {
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            const T* corner = x + (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                // places are float too: values of one size make vectors of one length
                float best[W], which[W] = {}, total[W] = {}, k = 0;
                for (long i = 0; i < W; i++) best[i] = load(corner[c + i]);
                for (long t = 0; t < tall; t++) {
                    for (long f = 0; f < wide; f++, k++) {
                        const T* in = corner + (t * pixels * wide + f) * channels + c;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(in[i]);
                            bool larger = value > best[i] || value != value;    // NaN wins
                            best[i] = larger ? value : best[i];
                            which[i] = larger ? k : which[i];
                            total[i] += value;
                        }
                    }
                }
                for (long i = 0; i < W; i++)
                    store(y + at + c + i, from ? best[i] : total[i] / k);
                if (from)
                    for (long i = 0; i < W; i++) from[at + c + i] = uint8_t(which[i]);
            });
        }
    }
}

template <class T>
void unpool(const T* dy, const uint8_t* from, T* dx, long lines, long tall, long pixels, long wide,
            long channels) {
    const float share = from ? 1 : 1 / float(tall * wide);
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            T* corner = dx + (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                // a mean is shared by all places: then each compares 0 with 0
                float g[W], which[W] = {};
                for (long i = 0; i < W; i++) g[i] = load(dy[at + c + i]) * share;
                if (from)
                    for (long i = 0; i < W; i++) which[i] = from[at + c + i];
                for (long t = 0; t < tall; t++) {
                    for (long f = 0; f < wide; f++) {
                        T* out = corner + (t * pixels * wide + f) * channels + c;
                        float k = from ? t * wide + f : 0;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) store(out + i, which[i] == k ? g[i] : 0);
                    }
                }
            });
        }
    }
}

}  // namespace

// what fused.py calls; `half`: the values of many channels are bfloat16
extern "C" {

void pool_forward(int half, const void* x, void* y, uint8_t* from, long lines, long tall,
                  long pixels, long wide, long channels) {
    if (half) pool((const bfloat16*)x, (bfloat16*)y, from, lines, tall, pixels, wide, channels);
    else pool((const float*)x, (float*)y, from, lines, tall, pixels, wide, channels);
}

void pool_backward(int half, const void* dy, const uint8_t* from, void* dx, long lines, long tall,
                   long pixels, long wide, long channels) {
    if (half) unpool((const bfloat16*)dy, from, (bfloat16*)dx, lines, tall, pixels, wide, channels);
    else unpool((const float*)dy, from, (float*)dx, lines, tall, pixels, wide, channels);
}

}
