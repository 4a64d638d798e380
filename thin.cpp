// Convolutions with one or two channels on one side, and pooling, for fused.py.
//
// Images are (height, width, channels), one pixel after the other. What is summed over pixels is
// summed in float32 within a line and in float64 beyond, in an order of its own: the result does
// not depend on the number of threads.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "fused.h"

namespace {

// -------------------------------------------------------------------------------------------------
// 3x3 convolutions, padded by one, with few channels on one side (`few`, mostly one) and many on
// the other. General ones fill their vectors with channels, and waste most of them here.

// the lines that are done by one thread, so that sums do not depend on the number of threads
const long LINES = 32;

// Lines of an image (height, width, channels) as float32 with a zero pixel at both ends. Three of
// them are kept; outside of the image they are zero.
template <class T>
struct Lines {
    const T* image;
    long height, length, border;        // values of a line, of a pixel
    std::vector<float> kept[3];
    long numbers[3] = {-9, -9, -9};

    Lines(const T* image, long height, long width, long channels)
        : image(image), height(height), length(width * channels), border(channels) {
        for (auto& line : kept) line.resize(length + 2 * border);
    }
    const float* get(long number) {
        long slot = (number + 3) % 3;
        if (numbers[slot] == number) return kept[slot].data();
        numbers[slot] = number;
        float* to = kept[slot].data() + border;
        const T* from = image + number * length;
        if (number < 0 || number >= height) std::fill(to, to + length, 0.0f);
        else for (long i = 0; i < length; i++) to[i] = load(from[i]);
        return kept[slot].data();
    }
};

// Calls work(part, image, first line, line behind the last) for all lines, in parallel.
template <class Work>
void each_part(long images, long height, Work work) {
    long per_image = (height + LINES - 1) / LINES;
    #pragma omp parallel for schedule(static)
    for (long part = 0; part < images * per_image; part++) {
        long first = part % per_image * LINES;
        work(part, part / per_image, first, std::min(height, first + LINES));
    }
}

// Calls work(number of channels, first channel) with as many channels at once as a vector holds.
template <class Work>
void in_vectors(long channels, Work work) {
    long c = 0;
    for (; c + 16 <= channels; c += 16) work(std::integral_constant<long, 16>(), c);
    for (; c + 8 <= channels; c += 8) work(std::integral_constant<long, 8>(), c);
    for (; c < channels; c++) work(std::integral_constant<long, 1>(), c);
}

// few -> many; weight (few, 3, 3, many)
template <class T>
void spread(const float* x, const float* weight, const float* bias, T* y, long images, long height,
            long width, long few, long many) {
    each_part(images, height, [&](long, long image, long first, long end) {
        Lines<float> lines(x + image * height * width * few, height, width, few);
        for (long line = first; line < end; line++) {
            const float* rows[3] = {lines.get(line - 1), lines.get(line), lines.get(line + 1)};
            T* out = y + (image * height + line) * width * many;
            in_vectors(many, [&](auto size, long c) {
                constexpr long W = size;
                for (long f = 0; f < width; f++) {
                    float total[W];
                    for (long i = 0; i < W; i++) total[i] = bias[c + i];
                    for (long s = 0; s < few; s++) {
                        for (long k = 0; k < 9; k++) {
                            float value = rows[k / 3][(f + k % 3) * few + s];
                            const float* w = weight + (s * 9 + k) * many + c;
                            #pragma omp simd
                            for (long i = 0; i < W; i++) total[i] += value * w[i];
                        }
                    }
                    for (long i = 0; i < W; i++) store(out + f * many + c + i, total[i]);
                }
            });
        }
    });
}

// many -> few; weight (few, 3, 3, many)
template <class T>
void gather(const T* x, const float* weight, const float* bias, float* y, long images, long height,
            long width, long few, long many) {
    each_part(images, height, [&](long, long image, long first, long end) {
        Lines<T> lines(x + image * height * width * many, height, width, many);
        std::vector<float> sums(width);
        for (long line = first; line < end; line++) {
            const float* rows[3] = {lines.get(line - 1), lines.get(line), lines.get(line + 1)};
            float* out = y + (image * height + line) * width * few;
            for (long s = 0; s < few; s++) {
                std::fill(sums.begin(), sums.end(), bias[s]);
                in_vectors(many, [&](auto size, long c) {
                    constexpr long W = size;
                    float w[9][W];
                    for (long k = 0; k < 9; k++)
                        for (long i = 0; i < W; i++) w[k][i] = weight[(s * 9 + k) * many + c + i];
                    for (long f = 0; f < width; f++) {
                        const float* above = rows[0] + f * many + c;
                        const float* here = rows[1] + f * many + c;
                        const float* below = rows[2] + f * many + c;
                        float total = 0;
                        #pragma omp simd reduction(+ : total)
                        for (long i = 0; i < W; i++)
                            for (long k = 0; k < 3; k++)
                                total += above[k * many + i] * w[k][i]
                                         + here[k * many + i] * w[3 + k][i]
                                         + below[k * many + i] * w[6 + k][i];
                        sums[f] += total;
                    }
                });
                for (long f = 0; f < width; f++) out[f * few + s] = sums[f];
            }
        }
    });
}

// sums (few, 10, many): of the values of `many` times those of `few` around them, (3, 3), and, in
// the tenth place, of the values of `many`
template <class T>
void correlate(const float* x, const T* y, float* sums, long images, long height, long width,
               long few, long many) {
    long parts = images * ((height + LINES - 1) / LINES), size = few * 10 * many;
    std::vector<double> totals(parts * size);
    each_part(images, height, [&](long part, long image, long first, long end) {
        Lines<float> lines(x + image * height * width * few, height, width, few);
        double* mine = &totals[part * size];
        for (long line = first; line < end; line++) {
            const float* rows[3] = {lines.get(line - 1), lines.get(line), lines.get(line + 1)};
            const T* here = y + (image * height + line) * width * many;
            in_vectors(many, [&](auto vector, long c) {
                constexpr long W = vector;
                for (long s = 0; s < few; s++) {
                    float total[10][W] = {};
                    for (long f = 0; f < width; f++) {
                        const T* pixel = here + f * many + c;
                        for (long k = 0; k < 9; k++) {
                            float value = rows[k / 3][(f + k % 3) * few + s];
                            #pragma omp simd
                            for (long i = 0; i < W; i++) total[k][i] += value * load(pixel[i]);
                        }
                        #pragma omp simd
                        for (long i = 0; i < W; i++) total[9][i] += load(pixel[i]);
                    }
                    for (long k = 0; k < 10; k++)
                        for (long i = 0; i < W; i++)
                            mine[(s * 10 + k) * many + c + i] += total[k][i];
                }
            });
        }
    });
    for (long i = 0; i < size; i++) {
        double total = 0;
        for (long part = 0; part < parts; part++) total += totals[part * size + i];
        sums[i] = float(total);
    }
}

// -------------------------------------------------------------------------------------------------
// pooling of (lines, tall, pixels, wide, channels) to (lines, pixels, channels); `from` tells which
// of the values was the largest, and is null for the mean

template <class T>
void pool(const T* x, T* y, uint8_t* from, long lines, long tall, long pixels, long wide,
          long channels) {
    #pragma omp parallel for schedule(static)
    for (long line = 0; line < lines; line++) {
        for (long pixel = 0; pixel < pixels; pixel++) {
            const T* corner = x + (line * tall * pixels + pixel) * wide * channels;
            long at = (line * pixels + pixel) * channels;
            in_vectors(channels, [&](auto size, long c) {
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
            in_vectors(channels, [&](auto size, long c) {
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

void thin_spread(int half, const float* x, const float* weight, const float* bias, void* y,
                 long images, long height, long width, long few, long many) {
    if (half) spread(x, weight, bias, (bfloat16*)y, images, height, width, few, many);
    else spread(x, weight, bias, (float*)y, images, height, width, few, many);
}

void thin_gather(int half, const void* x, const float* weight, const float* bias, float* y,
                 long images, long height, long width, long few, long many) {
    if (half) gather((const bfloat16*)x, weight, bias, y, images, height, width, few, many);
    else gather((const float*)x, weight, bias, y, images, height, width, few, many);
}

void thin_correlate(int half, const float* x, const void* y, float* sums, long images, long height,
                    long width, long few, long many) {
    if (half) correlate(x, (const bfloat16*)y, sums, images, height, width, few, many);
    else correlate(x, (const float*)y, sums, images, height, width, few, many);
}

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
