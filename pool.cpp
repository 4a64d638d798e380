// Pooling of images (height, width, channels), one pixel after the other, for fused.py: alone, or
// with BatchNorm and LeakyReLU before it.

#include <algorithm>
#include <cmath>
#include <vector>

#include "fused.h"

namespace {

// The BatchNorm and LeakyReLU before, if scale is given; each (channels).
struct Norm {
    const float *scale, *shift;
    float slope;
    const float *mean = nullptr, *along = nullptr, *still = nullptr;    // for the gradients
};

// W values from channel c on; without values they are `other`
template <long W>
void take(float* to, const float* values, long c, float other = 0) {
    for (long i = 0; i < W; i++) to[i] = values ? values[c + i] : other;
}

// (lines, tall, pixels, wide, channels) -> (lines, pixels, channels). `from` tells which of the
// values was the largest, and is null for the mean.
template <class T>
void pool(const T* x, T* y, uint8_t* from, Norm norm, long lines, long tall, long pixels, long wide,
          long channels) {
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            const T* corner = x + (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float scale[W], shift[W], slope = norm.scale ? norm.slope : 1;
                take<W>(scale, norm.scale, c, 1);
                take<W>(shift, norm.shift, c);
                // places are float too: values of one size make vectors of one length
                float best[W], which[W] = {}, total[W] = {}, k = 0;
                for (long i = 0; i < W; i++) best[i] = -INFINITY;
                for (long t = 0; t < tall; t++) {
                    for (long f = 0; f < wide; f++, k++) {
                        const T* in = corner + (t * pixels * wide + f) * channels + c;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(in[i]) * scale[i] + shift[i];
                            value = value > 0 ? value : value * slope;
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

// The sums over pixels, (2, channels), of the gradient before the LeakyReLU, and of its product
// with the distance of x from the mean. Only the largest values have gradients.
template <class T>
void sum_pooled(const T* dy, const uint8_t* from, const T* x, Norm norm, double* sums, long lines,
                long tall, long pixels, long wide, long channels) {
    std::vector<float> of_lines(lines * 2 * channels);
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            const T* corner = x + (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float which[W], largest[W] = {}, k = 0, scale[W], shift[W], mean[W];
                float sum[W], products[W], slope = norm.slope;
                float* to = &of_lines[line * 2 * channels];
                take<W>(scale, norm.scale, c);
                take<W>(shift, norm.shift, c);
                take<W>(mean, norm.mean, c);
                take<W>(sum, to, c);
                take<W>(products, to, channels + c);
                for (long i = 0; i < W; i++) which[i] = from[at + c + i];
                for (long t = 0; t < tall; t++) {
                    for (long f = 0; f < wide; f++, k++) {
                        const T* in = corner + (t * pixels * wide + f) * channels + c;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(in[i]);
                            largest[i] = which[i] == k ? value : largest[i];
                        }
                    }
                }
                #pragma omp simd
                for (long i = 0; i < W; i++) {
                    float g = load(dy[at + c + i]), value = largest[i];
                    g = value * scale[i] + shift[i] > 0 ? g : g * slope;
                    sum[i] += g;
                    products[i] += g * (value - mean[i]);
                }
                std::copy_n(sum, W, to + c);
                std::copy_n(products, W, to + channels + c);
            });
        }
    }
    for (long i = 0; i < 2 * channels; i++) {
        sums[i] = 0;
        for (long line = 0; line < lines; line++) sums[i] += of_lines[line * 2 * channels + i];
    }
}

// The gradient of the input. With a norm it is scale g + along x + still, g being the gradient
// before the LeakyReLU.
template <class T>
void unpool(const T* dy, const uint8_t* from, T* dx, const T* x, Norm norm, long lines, long tall,
            long pixels, long wide, long channels) {
    const float share = from ? 1 : 1 / float(tall * wide);
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            const long first = (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float scale[W], shift[W], along[W], still[W], slope = norm.slope;
                take<W>(scale, norm.scale, c);
                take<W>(shift, norm.shift, c);
                take<W>(along, norm.along, c);
                take<W>(still, norm.still, c);
                // a mean is shared by all places: then each compares 0 with 0
                float g[W], which[W] = {};
                for (long i = 0; i < W; i++) g[i] = load(dy[at + c + i]) * share;
                if (from)
                    for (long i = 0; i < W; i++) which[i] = from[at + c + i];
                for (long t = 0; t < tall; t++) {
                    for (long f = 0; f < wide; f++) {
                        const long place = first + (t * pixels * wide + f) * channels + c;
                        float k = from ? t * wide + f : 0;
                        if (!norm.scale) {
                            #pragma omp simd
                            for (long i = 0; i < W; i++)
                                store(dx + place + i, which[i] == k ? g[i] : 0);
                            continue;
                        }
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(x[place + i]), mine = which[i] == k ? g[i] : 0;
                            mine = value * scale[i] + shift[i] > 0 ? mine : mine * slope;
                            store(dx + place + i, scale[i] * mine + along[i] * value + still[i]);
                        }
                    }
                }
            });
        }
    }
}

}  // namespace

// what fused.py calls; `half`: the values of images are bfloat16
extern "C" {

void pool_forward(int half, const void* x, void* y, uint8_t* from, const float* scale,
                  const float* shift, float slope, long lines, long tall, long pixels, long wide,
                  long channels) {
    Norm norm{scale, shift, slope};
    if (half) pool((const bfloat16*)x, (bfloat16*)y, from, norm, lines, tall, pixels, wide,
                   channels);
    else pool((const float*)x, (float*)y, from, norm, lines, tall, pixels, wide, channels);
}

void pool_sums(int half, const void* dy, const uint8_t* from, const void* x, const float* scale,
               const float* shift, float slope, const float* mean, double* sums, long lines,
               long tall, long pixels, long wide, long channels) {
    Norm norm{scale, shift, slope, mean};
    if (half) sum_pooled((const bfloat16*)dy, from, (const bfloat16*)x, norm, sums, lines, tall,
                         pixels, wide, channels);
    else sum_pooled((const float*)dy, from, (const float*)x, norm, sums, lines, tall, pixels, wide,
                    channels);
}

void pool_backward(int half, const void* dy, const uint8_t* from, void* dx, const void* x,
                   const float* scale, const float* shift, float slope, const float* along,
                   const float* still, long lines, long tall, long pixels, long wide,
                   long channels) {
    Norm norm{scale, shift, slope, nullptr, along, still};
    if (half) unpool((const bfloat16*)dy, from, (bfloat16*)dx, (const bfloat16*)x, norm, lines,
                     tall, pixels, wide, channels);
    else unpool((const float*)dy, from, (float*)dx, (const float*)x, norm, lines, tall, pixels,
                wide, channels);
}

}
