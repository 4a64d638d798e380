// 3x3 convolutions, padded by one, with few channels on a side, for fused.py. All is float32.
//
// General convolutions fill their vectors with channels, and waste most of them if those are few.
// Here the lines of an image (height, width, channels) are taken apart as they are read, and
// vectors hold neighbours in a line. The input may be normalised and go through a LeakyReLU then.
// Sums do not depend on the number of threads.

#include <algorithm>
#include <utility>
#include <vector>

#include "fused.h"

namespace {

// -------------------------------------------------------------------------------------------------
// pixels to vectors of one channel each, and back

// the values of two vectors, numbered one after the other, that stand at these places
template <long... AT>
inline vec pick(vec a, vec b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, AT...);
#else
    typedef int places __attribute__((vector_size(4 * LANES)));
    return __builtin_shuffle(a, b, places{AT...});
#endif
}

template <long... I>
inline void split(vec a, vec b, vec& evens, vec& odds, std::integer_sequence<long, I...>) {
    evens = pick<2 * I...>(a, b);
    odds = pick<2 * I + 1 ...>(a, b);
}

template <long... I>
inline void merge(vec a, vec b, vec& first, vec& second, std::integer_sequence<long, I...>) {
    first = pick<I / 2 + I % 2 * LANES...>(a, b);
    second = pick<LANES / 2 + I / 2 + I % 2 * LANES...>(a, b);
}

const std::make_integer_sequence<long, LANES> EACH;

// LANES pixels of C values, C a power of two -> C vectors: each step halves the values' distance
template <long C>
inline void take_apart(vec* values) {
    for (long k = 1; k < C; k *= 2) {
        vec old[C];
        std::copy_n(values, C, old);
        for (long i = 0; i < C / 2; i++)
            split(old[2 * i], old[2 * i + 1], values[i], values[C / 2 + i], EACH);
    }
}

// and back
template <long C>
inline void bring_together(vec* values) {
    for (long k = 1; k < C; k *= 2) {
        vec old[C];
        std::copy_n(values, C, old);
        for (long i = 0; i < C / 2; i++)
            merge(old[i], old[C / 2 + i], values[2 * i], values[2 * i + 1], EACH);
    }
}

// Whether C of the channels of LANES pixels are C whole vectors in memory, and how far apart.
template <long C>
inline bool are_vectors(long channels, long pixels) {
    return pixels == LANES && (channels == C || C == LANES);
}
inline long distance(long channels) { return std::max(LANES, channels); }

// C of the channels of up to LANES pixels
template <long C>
inline void read_pixels(const float* from, long channels, long pixels, vec* to) {
    if (are_vectors<C>(channels, pixels)) {
        for (long c = 0; c < C; c++) to[c] = get(from + c * distance(channels));
    } else {
        float values[C * LANES] = {};
        for (long i = 0; i < pixels; i++) std::copy_n(from + i * channels, C, values + i * C);
        for (long c = 0; c < C; c++) to[c] = get(values + c * LANES);
    }
    take_apart<C>(to);
}

template <long C>
inline void write_pixels(vec* from, float* to, long channels, long pixels, bool far) {
    bring_together<C>(from);
    if (are_vectors<C>(channels, pixels)) {
        for (long c = 0; c < C; c++) {
            if (far) put_far(to + c * distance(channels), from[c]);
            else put(to + c * distance(channels), from[c]);
        }
    } else {
        float values[C * LANES];
        for (long c = 0; c < C; c++) put(values + c * LANES, from[c]);
        for (long i = 0; i < pixels; i++) std::copy_n(values + i * C, C, to + i * channels);
    }
}

// -------------------------------------------------------------------------------------------------
// lines

const long VECTORS = 4, STEP = VECTORS * LANES;     // so many pixels are computed at a time

// Lines taken apart, and normalised: (channels, apart) from the first pixel on, with zeros beside
// the image, above and below. The last four are kept.
class Lines {
    const Images& images;
    std::vector<Buffer> kept;
    const Buffer zeros;
    long numbers[4] = {-1, -1, -1, -1};

    void read(const float* from, float* to) const {
        const long width = images.width, channels = images.channels;
        in_groups<LANES>(channels, [&](auto size, long c) {
            for (long f = 0; f < width; f += LANES) {
                const long pixels = std::min(LANES, width - f);
                vec values[size];
                read_pixels<size>(from + f * channels + c, channels, pixels, values);
                for (long i = 0; i < size; i++) {
                    vec z = values[i];
                    float* at = to + (c + i) * apart + f;
                    if (images.scale) {
                        if (with_plain) put(at + channels * apart, z);
                        z = z * images.scale[c + i] + images.shift[c + i];
                        z = z > 0 ? z : z * images.slope;
                    }
                    for (long j = pixels; j < LANES; j++) z[j] = 0;
                    put(at, z);
                }
            }
        });
    }

    static long apart_of(const Images& images) { return round_up(images.width, STEP) + LANES; }

public:
    const long apart;           // floats from one channel to the next
    const bool with_plain;      // behind the channels are then those that are not normalised

    Lines(const Images& images, bool with_plain)
        : images(images),
          kept(4, Buffer((1 + with_plain) * images.channels * apart_of(images) + LANES)),
          zeros(kept[0]), apart(apart_of(images)), with_plain(with_plain) {}

    const float* get_line(long number) {
        const long slot = number % 4, size = images.width * images.channels;
        float* to = kept[slot].at(LANES);
        if (numbers[slot] != number) read(images.values + number * size, to);
        numbers[slot] = number;
        return to;
    }

    // that line of all images, and those above and below it
    void get_three(long number, const float** three) {
        const long line = number % images.height;
        three[0] = line > 0 ? get_line(number - 1) : zeros.at(LANES);
        three[1] = get_line(number);
        three[2] = line + 1 < images.height ? get_line(number + 1) : zeros.at(LANES);
    }
};

// -------------------------------------------------------------------------------------------------
// the convolution

// N channels of results, STEP pixels each: sums over three lines, channels and three neighbours;
// weight (3, 3, c_in, c_out)
template <long N>
inline void convolve_block(const float* const* lines, long at, long apart, long c_in,
                           const float* weight, long c_out, const float* bias, float* to,
                           Ahead& ahead) {
    constexpr long V = N > 4 ? VECTORS / 2 : VECTORS;
    for (long end = at + STEP; at < end; at += V * LANES, to += V * LANES) {
        vec sums[N][V];
        for (long n = 0; n < N; n++)
            for (long v = 0; v < V; v++) sums[n][v] = vec{} + (bias ? bias[n] : 0);
        for (long i = 0; i < 3; i++) {
            for (long c = 0; c < c_in; c++) {
                const float* x = lines[i] + c * apart + at - 1;
                const float* w = weight + (3 * i * c_in + c) * c_out;
                for (long v = 0; v < V; v += 2) ahead.ask();
                for (long k = 0; k < 3; k++, w += c_in * c_out) {
                    vec values[V];
                    for (long v = 0; v < V; v++) values[v] = get(x + k + v * LANES);
                    for (long n = 0; n < N; n++)
                        for (long v = 0; v < V; v++) sums[n][v] += w[n] * values[v];
                }
            }
        }
        for (long n = 0; n < N; n++)
            for (long v = 0; v < V; v++) put(to + n * STEP + v * LANES, sums[n][v]);
    }
}

// A line of results, y (width, c_out). Calls look(results (c_out, STEP), first pixel, pixels) too.
template <class Look>
inline void convolve_line(const float* const* lines, long apart, long width, long c_in,
                          const float* weight, const float* bias, float* y, long c_out, bool far,
                          Buffer& results, Ahead ahead, Look look) {
    for (long f = 0; f < width; f += STEP) {
        const long pixels = std::min(STEP, width - f);
        in_groups<8>(c_out, [&](auto group, long n) {
            convolve_block<group>(lines, f, apart, c_in, weight + n, c_out, bias ? bias + n : bias,
                                  results.at(n * STEP), ahead);
        });
        look(results.at(0), f, pixels);
        in_groups<LANES>(c_out, [&](auto group, long n) {
            for (long at = 0; at < pixels; at += LANES) {
                vec values[group];
                for (long i = 0; i < group; i++) values[i] = get(results.at((n + i) * STEP + at));
                write_pixels<group>(values, y + (f + at) * c_out + n, c_out,
                                    std::min(LANES, pixels - at), far);
            }
        });
    }
}

// Whether images are written past the caches: then all vectors must be at multiples of their size.
bool are_far(const float* y, long lines, long width, long channels) {
    const bool fits = LANES % channels == 0 || channels % LANES == 0;
    const bool is_aligned = uintptr_t(y) % sizeof(vec) == 0 && width * channels % LANES == 0;
    return fits && is_aligned && 4 * lines * width * channels >= FAR;
}

void convolve(const Images& images, const float* weight, const float* bias, float* y, long c_out) {
    const long width = images.width, c_in = images.channels, all = images.count * images.height;
    const bool far = are_far(y, all, width, c_out);
    #pragma omp parallel
    {
        Lines lines(images, false);
        Buffer results(c_out * STEP);
        #pragma omp for schedule(static)
        for (long number = 0; number < all; number++) {
            const float* three[3];
            lines.get_three(number, three);
            convolve_line(three, lines.apart, width, c_in, weight, bias, y + number * width * c_out,
                          c_out, far, results, lines_ahead(images, number + 2, 1),
                          [](const float*, long, long) {});
        }
        wait_for_far();
    }
}

// -------------------------------------------------------------------------------------------------
// gradients

// (3, I, O) sums of vectors, of sums (3, c_in, c_out), are increased by I lines of the input, each
// moved by -1, 0 and 1, times O lines of the gradient
template <long I, long O>
inline void correlate(const float* x, const float* g, long apart, long length, float* sums,
                      long c_in, long c_out, Ahead& ahead) {
    vec s[3][I][O];
    auto at = [&](long k, long i, long o) { return sums + ((k * c_in + i) * c_out + o) * LANES; };
    for (long k = 0; k < 3; k++)
        for (long i = 0; i < I; i++)
            for (long o = 0; o < O; o++) s[k][i][o] = get(at(k, i, o));
    for (long f = 0; f < length; f += LANES) {
        vec right[O];
        ahead.ask();
        for (long o = 0; o < O; o++) right[o] = get(g + o * apart + f);
        for (long i = 0; i < I; i++) {
            for (long k = 0; k < 3; k++) {
                vec left = get(x + i * apart + f + k - 1);
                for (long o = 0; o < O; o++) s[k][i][o] += left * right[o];
            }
        }
    }
    for (long k = 0; k < 3; k++)
        for (long i = 0; i < I; i++)
            for (long o = 0; o < O; o++) put(at(k, i, o), s[k][i][o]);
}

// The gradients of the weight, the bias and, if dx is not null, of the input; all three from lines
// that are read once. turned (3, 3, c_out, c_in) is the weight turned around. If the input is
// normalised, dx is the gradient of what comes of that, and its sums for norm_backward() are made
// too. sums: of the weight (3, 3, c_in, c_out), of the bias (c_out), and those (2, c_in).
void backward(const Images& images, const Images& gradients, const float* turned, const float* mean,
              float* dx, double* sums) {
    const long c_in = images.channels, c_out = gradients.channels, width = images.width;
    const long of_bias = 9 * c_in * c_out, of_norm = of_bias + c_out, count = of_norm + 2 * c_in;
    const long all = images.count * images.height, length = round_up(width, LANES);
    const bool with_norm = dx && images.scale, far = dx && are_far(dx, all, width, c_in);

    // parts are summed by one thread each, in float32, and then together in float64
    const long parts = std::clamp(all / 16, 1L, 64L), per_part = (all + parts - 1) / parts;
    std::vector<double> totals(parts * count);
    #pragma omp parallel
    {
        Lines lines(images, with_norm), gradient_lines(gradients, false);
        const long apart = lines.apart;
        Buffer results(c_in * STEP);
        #pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            Buffer vectors(count * LANES);
            const long end = std::min(all, (part + 1) * per_part);
            for (long number = part * per_part; number < end; number++) {
                const float *x[3], *g[3];
                lines.get_three(number, x);
                gradient_lines.get_three(number, g);

                // of the weight: line by line of the input around one line of the gradient
                Ahead ahead = lines_ahead(images, number + 2, 1);
                for (long row = 0; row < 3; row++)
                    in_groups<LANES / 8>(c_in, [&](auto ins, long c) {
                        in_groups<4>(c_out, [&](auto outs, long n) {
                            float* to = vectors.at(((3 * row * c_in + c) * c_out + n) * LANES);
                            correlate<ins, outs>(x[row] + c * apart, g[1] + n * apart, apart,
                                                 length, to, c_in, c_out, ahead);
                        });
                    });

                // of the bias
                for (long n = 0; n < c_out; n++) {
                    float* to = vectors.at((of_bias + n) * LANES);
                    vec total = get(to);
                    for (long f = 0; f < length; f += LANES) total += get(g[1] + n * apart + f);
                    put(to, total);
                }

                // of the input, and the sums of its norm while both are at hand
                if (!dx) continue;
                auto look = [&](const float* made, long f, long pixels) {
                    for (long c = 0; with_norm && c < c_in; c++) {
                        float* to = vectors.at((of_norm + c) * LANES);
                        float* to_products = to + c_in * LANES;
                        vec total = get(to), products = get(to_products);
                        for (long at = 0; at < pixels; at += LANES) {
                            const float* here = x[1] + c * apart + f + at;
                            vec grad = get(made + c * STEP + at);
                            grad = get(here) > 0 ? grad : grad * images.slope;
                            for (long j = pixels - at; j < LANES; j++) grad[j] = 0;
                            total += grad;
                            products += grad * (get(here + c_in * apart) - mean[c]);
                        }
                        put(to, total);
                        put(to_products, products);
                    }
                };
                convolve_line(g, apart, width, c_out, turned, nullptr, dx + number * width * c_in,
                              c_in, far, results, lines_ahead(gradients, number + 2, 1), look);
            }
            for (long i = 0; i < count * LANES; i++)
                totals[part * count + i / LANES] += *vectors.at(i);
        }
        wait_for_far();
    }
    for (long i = 0; i < count; i++) {
        sums[i] = 0;
        for (long part = 0; part < parts; part++) sums[i] += totals[part * count + i];
    }
}

}  // namespace

// what fused.py calls; scale and shift may be null: the input is taken as it is
extern "C" {

void narrow_forward(const float* x, const float* scale, const float* shift, float slope,
                    const float* weight, const float* bias, float* y, long count, long height,
                    long width, long c_in, long c_out) {
    convolve({x, count, height, width, c_in, scale, shift, slope}, weight, bias, y, c_out);
}

void narrow_backward(const float* x, const float* scale, const float* shift, float slope,
                     const float* dy, const float* turned, const float* mean, float* dx,
                     double* sums, long count, long height, long width, long c_in, long c_out) {
    backward({x, count, height, width, c_in, scale, shift, slope},
             {dy, count, height, width, c_out}, turned, mean, dx, sums);
}

}
