// 3x3 convolutions with padding 1 and few input or output channels, in float32.
// Called by layers.py.
//
// General convolutions vectorise over channels, so with few channels most lanes are idle. Here each
// line of an NHWC image is deinterleaved into one row per channel as it is read, and vectors hold
// neighbouring pixels. BatchNorm and LeakyReLU of the input are fused into that pass. Results do
// not depend on the number of threads.

#include <algorithm>
#include <utility>
#include <vector>

#include "fused.h"

namespace {

// -------------------------------------------------------------------------------------------------
// interleaved pixels <-> one vector per channel

// The elements INDEX of the concatenation of a and b.
template <long... INDEX>
inline vec shuffle(vec a, vec b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, INDEX...);
#else
    typedef int indices __attribute__((vector_size(4 * LANES)));
    return __builtin_shuffle(a, b, indices{INDEX...});
#endif
}

template <long... I>
inline void deinterleave_pair(vec a, vec b, vec& evens, vec& odds,
                              std::integer_sequence<long, I...>) {
    evens = shuffle<2 * I...>(a, b);
    odds = shuffle<2 * I + 1 ...>(a, b);
}

template <long... I>
inline void interleave_pair(vec a, vec b, vec& first, vec& second,
                            std::integer_sequence<long, I...>) {
    first = shuffle<I / 2 + I % 2 * LANES...>(a, b);
    second = shuffle<LANES / 2 + I / 2 + I % 2 * LANES...>(a, b);
}

const std::make_integer_sequence<long, LANES> INDICES;

// (LANES, C) -> (C, LANES), C a power of two, in log2(C) passes.
template <long C>
inline void deinterleave(vec* values) {
    for (long k = 1; k < C; k *= 2) {
        vec old[C];
        std::copy_n(values, C, old);
        for (long i = 0; i < C / 2; i++)
            deinterleave_pair(old[2 * i], old[2 * i + 1], values[i], values[C / 2 + i], INDICES);
    }
}

// (C, LANES) -> (LANES, C)
template <long C>
inline void interleave(vec* values) {
    for (long k = 1; k < C; k *= 2) {
        vec old[C];
        std::copy_n(values, C, old);
        for (long i = 0; i < C / 2; i++)
            interleave_pair(old[i], old[C / 2 + i], values[2 * i], values[2 * i + 1], INDICES);
    }
}

// Whether C channels of the pixels are C full vectors in memory, vector_stride() floats apart.
template <long C>
inline bool is_contiguous(long channels, long pixels) {
    return pixels == LANES && (channels == C || C == LANES);
}
inline long vector_stride(long channels) { return std::max(LANES, channels); }

// C channels of up to LANES pixels -> C vectors
template <long C>
inline void load_pixels(const float* from, long channels, long pixels, vec* to) {
    if (is_contiguous<C>(channels, pixels)) {
        for (long c = 0; c < C; c++) to[c] = vload(from + c * vector_stride(channels));
    } else {
        float values[C * LANES] = {};
        for (long i = 0; i < pixels; i++) std::copy_n(from + i * channels, C, values + i * C);
        for (long c = 0; c < C; c++) to[c] = vload(values + c * LANES);
    }
    deinterleave<C>(to);
}

template <long C>
inline void store_pixels(vec* from, float* to, long channels, long pixels, bool stream) {
    interleave<C>(from);
    if (is_contiguous<C>(channels, pixels)) {
        for (long c = 0; c < C; c++) {
            if (stream) stream_store(to + c * vector_stride(channels), from[c]);
            else vstore(to + c * vector_stride(channels), from[c]);
        }
    } else {
        float values[C * LANES];
        for (long c = 0; c < C; c++) vstore(values + c * LANES, from[c]);
        for (long i = 0; i < pixels; i++) std::copy_n(values + i * C, C, to + i * channels);
    }
}

// -------------------------------------------------------------------------------------------------
// lines

const long VECTORS = 4, STEP = VECTORS * LANES;      // STEP: pixels per block

// Deinterleaved and normalised lines, (channels, stride), with zero padding on all sides. The last
// four lines are cached.
class Lines {
    const Images& images;
    std::vector<Buffer> cache;
    const Buffer zeros;
    long cached[4] = {-1, -1, -1, -1};

    void fill(const float* from, float* to) const {
        const long width = images.width, channels = images.channels;
        for_groups<LANES>(channels, [&](auto size, long c) {
            for (long f = 0; f < width; f += LANES) {
                const long pixels = std::min(LANES, width - f);
                vec values[size];
                load_pixels<size>(from + f * channels + c, channels, pixels, values);
                for (long i = 0; i < size; i++) {
                    vec z = values[i];
                    float* at = to + (c + i) * stride + f;
                    if (images.scale) {
                        if (keep_raw) vstore(at + channels * stride, z);
                        z = z * images.scale[c + i] + images.shift[c + i];
                        z = z > 0 ? z : z * images.slope;
                    }
                    for (long j = pixels; j < LANES; j++) z[j] = 0;
                    vstore(at, z);
                }
            }
        });
    }

    static long stride_of(const Images& images) { return round_up(images.width, STEP) + LANES; }

public:
    const long stride;          // floats from one channel to the next
    const bool keep_raw;        // append the channels before normalisation

    Lines(const Images& images, bool keep_raw)
        : images(images),
          cache(4, Buffer((1 + keep_raw) * images.channels * stride_of(images) + LANES)),
          zeros(cache[0]), stride(stride_of(images)), keep_raw(keep_raw) {}

    const float* get_line(long number) {
        const long slot = number % 4, size = images.width * images.channels;
        float* to = cache[slot].at(LANES);
        if (cached[slot] != number) fill(images.values + number * size, to);
        cached[slot] = number;
        return to;
    }

    // line `number`, counted over all images, and its neighbours above and below
    void get_three(long number, const float** three) {
        const long line = number % images.height;
        three[0] = line > 0 ? get_line(number - 1) : zeros.at(LANES);
        three[1] = get_line(number);
        three[2] = line + 1 < images.height ? get_line(number + 1) : zeros.at(LANES);
    }
};

// -------------------------------------------------------------------------------------------------
// the convolution

// N output channels of STEP pixels, starting at pixel `at`; weight is (3, 3, c_in, c_out).
template <long N>
inline void convolve_block(const float* const* lines, long at, long stride, long c_in,
                           const float* weight, long c_out, const float* bias, float* to,
                           Prefetch& prefetch) {
    constexpr long V = N > 4 ? VECTORS / 2 : VECTORS;
    for (long end = at + STEP; at < end; at += V * LANES, to += V * LANES) {
        vec sums[N][V];
        for (long n = 0; n < N; n++)
            for (long v = 0; v < V; v++) sums[n][v] = vec{} + (bias ? bias[n] : 0);
        for (long i = 0; i < 3; i++) {
            for (long c = 0; c < c_in; c++) {
                const float* x = lines[i] + c * stride + at - 1;
                const float* w = weight + (3 * i * c_in + c) * c_out;
                for (long v = 0; v < V; v += 2) prefetch.next();
                for (long k = 0; k < 3; k++, w += c_in * c_out) {
                    vec values[V];
                    for (long v = 0; v < V; v++) values[v] = vload(x + k + v * LANES);
                    for (long n = 0; n < N; n++)
                        for (long v = 0; v < V; v++) sums[n][v] += w[n] * values[v];
                }
            }
        }
        for (long n = 0; n < N; n++)
            for (long v = 0; v < V; v++) vstore(to + n * STEP + v * LANES, sums[n][v]);
    }
}

// One output line, y (width, c_out). Calls visit(results (c_out, STEP), first pixel, pixels) for
// each block of pixels.
template <class Visit>
inline void convolve_line(const float* const* lines, long stride, long width, long c_in,
                          const float* weight, const float* bias, float* y, long c_out, bool stream,
                          Buffer& results, Prefetch prefetch, Visit visit) {
    for (long f = 0; f < width; f += STEP) {
        const long pixels = std::min(STEP, width - f);
        for_groups<8>(c_out, [&](auto group, long n) {
            convolve_block<group>(lines, f, stride, c_in, weight + n, c_out, bias ? bias + n : bias,
                                  results.at(n * STEP), prefetch);
        });
        visit(results.at(0), f, pixels);
        for_groups<LANES>(c_out, [&](auto group, long n) {
            for (long at = 0; at < pixels; at += LANES) {
                vec values[group];
                for (long i = 0; i < group; i++) values[i] = vload(results.at((n + i) * STEP + at));
                store_pixels<group>(values, y + (f + at) * c_out + n, c_out,
                                    std::min(LANES, pixels - at), stream);
            }
        });
    }
}

// Whether to use non-temporal stores, which need aligned vectors.
bool use_streaming(const float* y, long lines, long width, long channels) {
    const bool fits = LANES % channels == 0 || channels % LANES == 0;
    const bool is_aligned = uintptr_t(y) % sizeof(vec) == 0 && width * channels % LANES == 0;
    return fits && is_aligned && 4 * lines * width * channels >= STREAM_BYTES;
}

void convolve(const Images& images, const float* weight, const float* bias, float* y, long c_out) {
    const long width = images.width, c_in = images.channels, n_lines = images.count * images.height;
    const bool stream = use_streaming(y, n_lines, width, c_out);
    #pragma omp parallel
    {
        Lines lines(images, false);
        Buffer results(c_out * STEP);
        #pragma omp for schedule(static)
        for (long number = 0; number < n_lines; number++) {
            const float* three[3];
            lines.get_three(number, three);
            convolve_line(three, lines.stride, width, c_in, weight, bias,
                          y + number * width * c_out, c_out, stream, results,
                          prefetch_lines(images, number + 2, 1), [](const float*, long, long) {});
        }
        stream_fence();
    }
}

// -------------------------------------------------------------------------------------------------
// gradients

// Accumulates the products of I input lines, shifted by -1, 0 and 1 pixels, with O gradient lines
// into sums, (3, c_in, c_out) vectors.
template <long I, long O>
inline void correlate(const float* x, const float* g, long stride, long length, float* sums,
                      long c_in, long c_out, Prefetch& prefetch) {
    vec s[3][I][O];
    auto at = [&](long k, long i, long o) { return sums + ((k * c_in + i) * c_out + o) * LANES; };
    for (long k = 0; k < 3; k++)
        for (long i = 0; i < I; i++)
            for (long o = 0; o < O; o++) s[k][i][o] = vload(at(k, i, o));
    for (long f = 0; f < length; f += LANES) {
        vec right[O];
        prefetch.next();
        for (long o = 0; o < O; o++) right[o] = vload(g + o * stride + f);
        for (long i = 0; i < I; i++) {
            for (long k = 0; k < 3; k++) {
                vec left = vload(x + i * stride + f + k - 1);
                for (long o = 0; o < O; o++) s[k][i][o] += left * right[o];
            }
        }
    }
    for (long k = 0; k < 3; k++)
        for (long i = 0; i < I; i++)
            for (long o = 0; o < O; o++) vstore(at(k, i, o), s[k][i][o]);
}

// Gradients of weight, bias and, if dx is not null, input, in one pass over the images. `flipped`,
// (3, 3, c_out, c_in), is the weight flipped in time and frequency. With a norm, dx is the gradient
// of the norm's output. sums: dweight (3, 3, c_in, c_out), dbias (c_out), then the sums (2, c_in)
// that norm_backward() takes.
void backward(const Images& images, const Images& gradients, const float* flipped,
              const float* mean, float* dx, double* sums) {
    const long c_in = images.channels, c_out = gradients.channels, width = images.width;
    const long bias_at = 9 * c_in * c_out, norm_at = bias_at + c_out, count = norm_at + 2 * c_in;
    const long n_lines = images.count * images.height, length = round_up(width, LANES);
    const bool with_norm = dx && images.scale;
    const bool stream = dx && use_streaming(dx, n_lines, width, c_in);

    // one thread accumulates each part, in float32; parts are added in float64, in order
    const long parts = std::clamp(n_lines / 16, 1L, 64L), per_part = (n_lines + parts - 1) / parts;
    std::vector<double> totals(parts * count);
    #pragma omp parallel
    {
        Lines lines(images, with_norm), gradient_lines(gradients, false);
        const long stride = lines.stride;
        Buffer results(c_in * STEP);
        #pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            Buffer vectors(count * LANES);
            const long end = std::min(n_lines, (part + 1) * per_part);
            for (long number = part * per_part; number < end; number++) {
                const float *x[3], *g[3];
                lines.get_three(number, x);
                gradient_lines.get_three(number, g);

                // weight: three input lines with one gradient line
                Prefetch prefetch = prefetch_lines(images, number + 2, 1);
                for (long row = 0; row < 3; row++)
                    for_groups<LANES / 8>(c_in, [&](auto ins, long c) {
                        for_groups<4>(c_out, [&](auto outs, long n) {
                            float* to = vectors.at(((3 * row * c_in + c) * c_out + n) * LANES);
                            correlate<ins, outs>(x[row] + c * stride, g[1] + n * stride, stride,
                                                 length, to, c_in, c_out, prefetch);
                        });
                    });

                // bias
                for (long n = 0; n < c_out; n++) {
                    float* to = vectors.at((bias_at + n) * LANES);
                    vec total = vload(to);
                    for (long f = 0; f < length; f += LANES) total += vload(g[1] + n * stride + f);
                    vstore(to, total);
                }

                // input, and the sums for its norm while the gradient is in cache
                if (!dx) continue;
                auto visit = [&](const float* grads, long f, long pixels) {
                    for (long c = 0; with_norm && c < c_in; c++) {
                        float* to = vectors.at((norm_at + c) * LANES);
                        float* to_products = to + c_in * LANES;
                        vec total = vload(to), products = vload(to_products);
                        for (long at = 0; at < pixels; at += LANES) {
                            const float* raw = x[1] + c * stride + f + at;
                            vec grad = vload(grads + c * STEP + at);
                            grad = vload(raw) > 0 ? grad : grad * images.slope;
                            for (long j = pixels - at; j < LANES; j++) grad[j] = 0;
                            total += grad;
                            products += grad * (vload(raw + c_in * stride) - mean[c]);
                        }
                        vstore(to, total);
                        vstore(to_products, products);
                    }
                };
                convolve_line(g, stride, width, c_out, flipped, nullptr, dx + number * width * c_in,
                              c_in, stream, results, prefetch_lines(gradients, number + 2, 1),
                              visit);
            }
            for (long i = 0; i < count * LANES; i++)
                totals[part * count + i / LANES] += *vectors.at(i);
        }
        stream_fence();
    }
    for (long i = 0; i < count; i++) {
        sums[i] = 0;
        for (long part = 0; part < parts; part++) sums[i] += totals[part * count + i];
    }
}

}  // namespace

// Called by layers.py. Without a norm, scale and shift are null.
extern "C" {

void narrow_forward(const float* x, const float* scale, const float* shift, float slope,
                    const float* weight, const float* bias, float* y, long count, long height,
                    long width, long c_in, long c_out) {
    convolve({x, count, height, width, c_in, scale, shift, slope}, weight, bias, y, c_out);
}

void narrow_backward(const float* x, const float* scale, const float* shift, float slope,
                     const float* dy, const float* flipped, const float* mean, float* dx,
                     double* sums, long count, long height, long width, long c_in, long c_out) {
    backward({x, count, height, width, c_in, scale, shift, slope},
             {dy, count, height, width, c_out}, flipped, mean, dx, sums);
}

}
