// Max and average pooling without overlap, alone or fused with BatchNorm and LeakyReLU before it.
// Called by layers.py.
//
// x is (rows, kh, columns, kw, channels) contiguous, y (rows, columns, channels): kh x kw is the
// pooling window, and rows are counted over all images.

#include <algorithm>
#include <cmath>
#include <vector>

#include "fused.h"

namespace {

// The pooling reads leaky_relu(scale x + shift), or x if scale is null. Each array is (channels).
struct Norm {
    const float *scale, *shift;
    float slope;
    const float *mean = nullptr, *a = nullptr, *b = nullptr;    // see unpool()
};

// W values from channel c on; `fallback` if values is null.
template <long W>
void load_channels(float* to, const float* values, long c, float fallback = 0) {
    for (long i = 0; i < W; i++) to[i] = values ? values[c + i] : fallback;
}

// argmax, (rows, columns, channels), receives the position of the maximum in its window; if it is
// null, y is the mean.
template <class T>
void pool(const T* x, T* y, uint8_t* argmax, Norm norm, long rows, long kh, long columns, long kw,
          long channels) {
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long column = 0; column < columns; column++) {
            const T* window = x + (row * kh * columns + column) * kw * channels;
            long at = (row * columns + column) * channels;
            for_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float scale[W], shift[W], slope = norm.scale ? norm.slope : 1;
                load_channels<W>(scale, norm.scale, c, 1);
                load_channels<W>(shift, norm.shift, c);
                // the index is float too: equal element sizes vectorise better
                float largest[W], index[W] = {}, total[W] = {}, k = 0;
                for (long i = 0; i < W; i++) largest[i] = -INFINITY;
                for (long t = 0; t < kh; t++) {
                    for (long f = 0; f < kw; f++, k++) {
                        const T* in = window + (t * columns * kw + f) * channels + c;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(in[i]) * scale[i] + shift[i];
                            value = value > 0 ? value : value * slope;
                            bool larger = value > largest[i] || value != value;    // NaN wins
                            largest[i] = larger ? value : largest[i];
                            index[i] = larger ? k : index[i];
                            total[i] += value;
                        }
                    }
                }
                for (long i = 0; i < W; i++)
                    store(y + at + c + i, argmax ? largest[i] : total[i] / k);
                if (argmax)
                    for (long i = 0; i < W; i++) argmax[at + c + i] = uint8_t(index[i]);
            });
        }
    }
}

// Sums over pixels for norm_backward(), (2, channels): of g, the gradient before the LeakyReLU, and
// of g (x - mean). g is nonzero only at the maxima.
template <class T>
void sum_pooled(const T* dy, const uint8_t* argmax, const T* x, Norm norm, double* sums, long rows,
                long kh, long columns, long kw, long channels) {
    std::vector<float> row_sums(rows * 2 * channels);
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long column = 0; column < columns; column++) {
            const T* window = x + (row * kh * columns + column) * kw * channels;
            long at = (row * columns + column) * channels;
            for_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float index[W], picked[W] = {}, k = 0, scale[W], shift[W], mean[W];
                float sum[W], products[W], slope = norm.slope;
                float* to = &row_sums[row * 2 * channels];
                load_channels<W>(scale, norm.scale, c);
                load_channels<W>(shift, norm.shift, c);
                load_channels<W>(mean, norm.mean, c);
                load_channels<W>(sum, to, c);
                load_channels<W>(products, to, channels + c);
                for (long i = 0; i < W; i++) index[i] = argmax[at + c + i];
                for (long t = 0; t < kh; t++) {
                    for (long f = 0; f < kw; f++, k++) {
                        const T* in = window + (t * columns * kw + f) * channels + c;
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(in[i]);
                            picked[i] = index[i] == k ? value : picked[i];
                        }
                    }
                }
                #pragma omp simd
                for (long i = 0; i < W; i++) {
                    float g = load(dy[at + c + i]), value = picked[i];
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
        for (long row = 0; row < rows; row++) sums[i] += row_sums[row * 2 * channels + i];
    }
}

// The gradient of x. With a norm, dx = scale g + a x + b, where g is the gradient before the
// LeakyReLU, and a and b are those of backward() in fused.cpp.
template <class T>
void unpool(const T* dy, const uint8_t* argmax, T* dx, const T* x, Norm norm, long rows, long kh,
            long columns, long kw, long channels) {
    const float factor = argmax ? 1 : 1 / float(kh * kw);
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long column = 0; column < columns; column++) {
            const long first = (row * kh * columns + column) * kw * channels;
            long at = (row * columns + column) * channels;
            for_groups<16>(channels, [&](auto size, long c) {
                constexpr long W = size;
                float scale[W], shift[W], a[W], b[W], slope = norm.slope;
                load_channels<W>(scale, norm.scale, c);
                load_channels<W>(shift, norm.shift, c);
                load_channels<W>(a, norm.a, c);
                load_channels<W>(b, norm.b, c);
                // mean pooling: index and k stay 0, so all pixels receive the gradient
                float g[W], index[W] = {};
                for (long i = 0; i < W; i++) g[i] = load(dy[at + c + i]) * factor;
                if (argmax)
                    for (long i = 0; i < W; i++) index[i] = argmax[at + c + i];
                for (long t = 0; t < kh; t++) {
                    for (long f = 0; f < kw; f++) {
                        const long offset = first + (t * columns * kw + f) * channels + c;
                        float k = argmax ? t * kw + f : 0;
                        if (!norm.scale) {
                            #pragma omp simd
                            for (long i = 0; i < W; i++)
                                store(dx + offset + i, index[i] == k ? g[i] : 0);
                            continue;
                        }
                        #pragma omp simd
                        for (long i = 0; i < W; i++) {
                            float value = load(x[offset + i]), grad = index[i] == k ? g[i] : 0;
                            grad = value * scale[i] + shift[i] > 0 ? grad : grad * slope;
                            store(dx + offset + i, scale[i] * grad + a[i] * value + b[i]);
                        }
                    }
                }
            });
        }
    }
}

}  // namespace

// Called by layers.py. half: x, y and their gradients are bfloat16, else float32.
extern "C" {

void pool_forward(int half, const void* x, void* y, uint8_t* argmax, const float* scale,
                  const float* shift, float slope, long rows, long kh, long columns, long kw,
                  long channels) {
    Norm norm{scale, shift, slope};
    if (half) pool((const bfloat16*)x, (bfloat16*)y, argmax, norm, rows, kh, columns, kw,
                   channels);
    else pool((const float*)x, (float*)y, argmax, norm, rows, kh, columns, kw, channels);
}

void pool_sums(int half, const void* dy, const uint8_t* argmax, const void* x, const float* scale,
               const float* shift, float slope, const float* mean, double* sums, long rows,
               long kh, long columns, long kw, long channels) {
    Norm norm{scale, shift, slope, mean};
    if (half) sum_pooled((const bfloat16*)dy, argmax, (const bfloat16*)x, norm, sums, rows, kh,
                         columns, kw, channels);
    else sum_pooled((const float*)dy, argmax, (const float*)x, norm, sums, rows, kh, columns, kw,
                    channels);
}

void pool_backward(int half, const void* dy, const uint8_t* argmax, void* dx, const void* x,
                   const float* scale, const float* shift, float slope, const float* a,
                   const float* b, long rows, long kh, long columns, long kw, long channels) {
    Norm norm{scale, shift, slope, nullptr, a, b};
    if (half) unpool((const bfloat16*)dy, argmax, (bfloat16*)dx, (const bfloat16*)x, norm, rows,
                     kh, columns, kw, channels);
    else unpool((const float*)dy, argmax, (float*)dx, (const float*)x, norm, rows, kh, columns,
                kw, channels);
}

}
