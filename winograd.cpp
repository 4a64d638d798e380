// 3x3 convolutions, padded by one, for fused.py: by Winograd's algorithm F(2x2, 3x3) (Lavin and
// Gray, arXiv 1509.09308), which multiplies 2.25 times less. All is float32.
//
// Images are (height, width, channels), one pixel after the other, of even height and width. The
// results are computed in tiles of 2x2. A tile of the input is 4x4 and overlaps its neighbours:
//
//     result = A' [(G kernel G') * (B' input B)] A        * value by value, summed over channels
//
// So a convolution is 16 matrix products, one per place in a tile. They run over some rows of tiles
// at a time, which stay in the processor's cache. The input may be normalised and go through a
// LeakyReLU as it is read. Sums do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "fused.h"

namespace {

// -------------------------------------------------------------------------------------------------
// vectors, and products of matrices

const long BLOCK = LANES;           // vectors of a block of a product
const long PLACES = 16;             // in a tile of 4x4
const long CACHE = 8192;            // tiles times channels that are worked on at a time

inline long blocks_of(long channels) { return (channels + LANES - 1) / LANES; }

// Matrices lie in blocks of LANES columns: (columns / LANES, rows, LANES). Most steps are constant.

// One matrix per place, each (rows, columns), columns rounded up to whole blocks. They are one line
// of the cache further apart than they need: powers of two would fall on the same places of it.
struct Places {
    long blocks, block, apart;      // distances in floats
    Buffer values;

    Places(long rows, long columns)
        : blocks(blocks_of(columns)), block(rows * LANES), apart(blocks * block + 16),
          values(PLACES * apart) {}
    float* at(long place, long row = 0, long column = 0) {
        return values.at(place * apart + column / LANES * block + row * LANES + column % LANES);
    }
};

// How the left matrix of a product is read: as it is, or transposed. ROW and COLUMN are steps, and
// more() is that of LANES columns. row() is where a row begins.
struct AsItIs {
    static const long ROW = LANES, COLUMN = 1;
    static long more(long block) { return block; }
    static long row(long i, long) { return i * LANES; }
};
struct Transposed {
    static const long ROW = 1, COLUMN = LANES;
    static long more(long) { return LANES * LANES; }
    static long row(long i, long block) { return i / LANES * block + i % LANES; }
};

// c (BLOCK / N rows, N blocks) = a b, or is increased by it. Memory is asked for ahead at about the
// rate that it comes at.
template <class A, long N>
inline void multiply_block(const float* a, long a_block, const float* b, long b_block, float* c,
                           long c_block, long depth, bool add, Ahead& ahead) {
    const long ROWS = BLOCK / N;
    vec sums[ROWS][N];
    for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < N; j++) sums[i][j] = add ? get(c + j * c_block + i * LANES) : vec{};
    for (long left = depth; left > 0; left -= LANES, a += A::more(a_block)) {
        const float* x = a;
        for (long i = 0; i < 8; i++) ahead.ask();
        for (long k = std::min(left, LANES); k > 0; k--, x += A::COLUMN, b += LANES) {
            vec right[N];
            for (long j = 0; j < N; j++) right[j] = get(b + j * b_block);
            for (long i = 0; i < ROWS; i++)
                for (long j = 0; j < N; j++) sums[i][j] += x[i * A::ROW] * right[j];
        }
    }
    for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < N; j++) put(c + j * c_block + i * LANES, sums[i][j]);
}

// The same for all rows and blocks: two blocks at a time, and the last one alone if their number is
// odd. Up to BLOCK - 1 rows more than asked for are computed.
template <class A>
void multiply(long rows, long blocks, const float* a, long a_block, const float* b, long b_block,
              float* c, long c_block, long depth, bool add, Ahead& ahead) {
    for (; blocks > 1; blocks -= 2, b += 2 * b_block, c += 2 * c_block)
        for (long i = 0; i < rows; i += BLOCK / 2)
            multiply_block<A, 2>(a + A::row(i, a_block), a_block, b, b_block, c + i * LANES,
                                 c_block, depth, add, ahead);
    for (long i = 0; blocks == 1 && i < rows; i += BLOCK)
        multiply_block<A, 1>(a + A::row(i, a_block), a_block, b, b_block, c + i * LANES, c_block,
                             depth, add, ahead);
}

// -------------------------------------------------------------------------------------------------
// lines of images

inline long tiles_of(const Images& images) { return images.width / 2; }                 // of a row
inline long rows_of(const Images& images) { return images.count * images.height / 2; }  // of tiles

// The lines that a row of tiles is made of, normalised, with zeros above and below the image, and
// in channels up to a whole vector. The last four are kept.
class Lines {
    const Images& images;
    std::vector<Buffer> kept;
    Buffer zeros;
    long numbers[4] = {-1, -1, -1, -1};

    void copy(const float* from, float* to, long wide) const {
        const long width = images.width, channels = images.channels;
        const long whole = channels / LANES * LANES;
        const float *scale = images.scale, *shift = images.shift, slope = images.slope;
        for (long f = 0; f < width; f++, from += channels, to += wide) {
            if (!scale) {
                std::copy_n(from, channels, to);
                continue;
            }
            for (long c = 0; c < whole; c += LANES) {
                vec z = get(from + c) * get(scale + c) + get(shift + c);
                put(to + c, z > 0 ? z : z * slope);
            }
            for (long c = whole; c < channels; c++) {
                float z = from[c] * scale[c] + shift[c];
                to[c] = z > 0 ? z : z * slope;
            }
        }
    }

public:
    const long channels;        // those of the images, up to a whole vector

    explicit Lines(const Images& images)
        : images(images), kept(4, Buffer(images.width * round_up(images.channels, LANES))),
          zeros(images.width * round_up(images.channels, LANES)),
          channels(round_up(images.channels, LANES)) {}

    // (width, channels): line `offset`, from -1 to 2, of a row of tiles
    const float* get_line(long row, long offset) {
        long image = row / (images.height / 2), line = row % (images.height / 2) * 2 + offset;
        if (line < 0 || line >= images.height) return zeros.at(0);
        long number = image * images.height + line, slot = number % 4;
        const float* from = images.values + number * images.width * images.channels;
        if (!images.scale && images.channels == channels) return from;
        if (numbers[slot] != number) copy(from, kept[slot].at(0), channels);
        numbers[slot] = number;
        return kept[slot].at(0);
    }
};

// -------------------------------------------------------------------------------------------------
// tiles

// B' input B of a row of tiles, to rows `at`... of `tiles`
void transform_input(Lines& lines, long row, long count, Places& tiles, long at) {
    const float* line[4];
    for (long i = 0; i < 4; i++) line[i] = lines.get_line(row, i - 1);
    // copies: the compiler must know that what is stored does not change them
    const long channels = lines.channels, apart = tiles.apart;
    for (long c = 0; c < channels; c += LANES) {
        float* block = tiles.at(0, at, c);
        vec t[4][4];
        auto column = [&](long f, long j) {
            vec d[4];
            for (long i = 0; i < 4; i++) d[i] = get(line[i] + f * channels + c);
            t[0][j] = d[0] - d[2];
            t[1][j] = d[1] + d[2];
            t[2][j] = d[2] - d[1];
            t[3][j] = d[1] - d[3];
        };
        for (long i = 0; i < 4; i++) t[i][2] = vec{};       // beside the image are zeros
        column(0, 3);
        for (long tile = 0; tile < count; tile++) {
            // the last two columns are the first two of the next tile
            for (long i = 0; i < 4; i++) {
                t[i][0] = t[i][2];
                t[i][1] = t[i][3];
            }
            column(2 * tile + 1, 2);
            if (tile + 1 < count) column(2 * tile + 2, 3);
            else for (long i = 0; i < 4; i++) t[i][3] = vec{};
            float* to = block + tile * LANES;
            for (long i = 0; i < 4; i++) {
                put(to + 4 * i * apart, t[i][0] - t[i][2]);
                put(to + (4 * i + 1) * apart, t[i][1] + t[i][2]);
                put(to + (4 * i + 2) * apart, t[i][2] - t[i][1]);
                put(to + (4 * i + 3) * apart, t[i][1] - t[i][3]);
            }
        }
    }
}

// A gradient A' of a row of tiles, whose gradients are 2x2
void transform_gradient(Lines& lines, long row, long count, Places& tiles, long at) {
    const float *upper = lines.get_line(row, 0), *lower = lines.get_line(row, 1);
    const long channels = lines.channels, apart = tiles.apart;
    for (long c = 0; c < channels; c += LANES) {
        float* block = tiles.at(0, at, c);
        for (long tile = 0; tile < count; tile++) {
            vec t[4][2];
            for (long j = 0; j < 2; j++) {
                vec a = get(upper + (2 * tile + j) * channels + c);
                vec b = get(lower + (2 * tile + j) * channels + c);
                t[0][j] = a;
                t[1][j] = a + b;
                t[2][j] = a - b;
                t[3][j] = -b;
            }
            float* to = block + tile * LANES;
            for (long i = 0; i < 4; i++) {
                put(to + 4 * i * apart, t[i][0]);
                put(to + (4 * i + 1) * apart, t[i][0] + t[i][1]);
                put(to + (4 * i + 2) * apart, t[i][0] - t[i][1]);
                put(to + (4 * i + 3) * apart, -t[i][1]);
            }
        }
    }
}

// A' products A, and the bias: two lines of the result, y (2, width, channels). Calls look(place in
// y, channel, vector, that of the next pixel) too.
template <class Look>
void transform_output(Places& tiles, long at, const Buffer& bias, float* y, long width,
                      long channels, bool far, Look look) {
    const long apart = tiles.apart, block = tiles.block;
    for (long tile = 0; tile < width / 2; tile++) {
        const float* from = tiles.at(0, at + tile);
        for (long c = 0; c < channels; c += LANES, from += block) {
            vec t[2][4];
            for (long j = 0; j < 4; j++) {
                vec m[4];
                for (long i = 0; i < 4; i++) m[i] = get(from + (4 * i + j) * apart);
                t[0][j] = m[0] + m[1] + m[2];
                t[1][j] = m[1] - m[2] - m[3];
            }
            for (long i = 0; i < 2; i++) {
                vec left = t[i][0] + t[i][1] + t[i][2] + get(bias.at(c));
                vec right = t[i][1] - t[i][2] - t[i][3] + get(bias.at(c));
                float* to = y + (i * width + 2 * tile) * channels + c;
                look(to, c, left, right);
                if (far) {
                    put_far(to, left);
                    put_far(to + channels, right);
                } else if (c + LANES <= channels) {
                    put(to, left);
                    put(to + channels, right);
                } else for (long k = 0; c + k < channels; k++) {
                    to[k] = left[k];
                    to[channels + k] = right[k];
                }
            }
        }
    }
}

// G kernel G' of a weight (3, 3, c_in, c_out)
Places transform_weight(const float* weight, long c_in, long c_out) {
    Places to(c_in, c_out);
    const long columns = round_up(c_out, LANES);
    #pragma omp parallel for schedule(static)
    for (long k = 0; k < c_in; k++) {
        Buffer taps(9 * columns);       // one row each, with zeros at its end
        for (long i = 0; i < 9; i++)
            std::copy_n(weight + (i * c_in + k) * c_out, c_out, taps.at(i * columns));
        for (long n = 0; n < columns; n += LANES) {
            vec t[4][3];
            for (long j = 0; j < 3; j++) {
                vec g[3];
                for (long i = 0; i < 3; i++) g[i] = get(taps.at((3 * i + j) * columns + n));
                t[0][j] = g[0];
                t[1][j] = 0.5f * (g[0] + g[1] + g[2]);
                t[2][j] = 0.5f * (g[0] - g[1] + g[2]);
                t[3][j] = g[2];
            }
            for (long i = 0; i < 4; i++) {
                put(to.at(4 * i, k, n), t[i][0]);
                put(to.at(4 * i + 1, k, n), 0.5f * (t[i][0] + t[i][1] + t[i][2]));
                put(to.at(4 * i + 2, k, n), 0.5f * (t[i][0] - t[i][1] + t[i][2]));
                put(to.at(4 * i + 3, k, n), t[i][2]);
            }
        }
    }
    return to;
}

// G' sums G: dweight (3, 3, c_in, c_out), of the sums of all parts
void transform_sums(std::vector<Places>& sums, float* dweight, long c_in, long c_out) {
    #pragma omp parallel for schedule(static)
    for (long k = 0; k < c_in; k++) {
        std::vector<double> total(PLACES * c_out);
        for (Places& part : sums)
            for (long i = 0; i < PLACES; i++)
                for (long n = 0; n < c_out; n++) total[i * c_out + n] += *part.at(i, k, n);
        for (long n = 0; n < c_out; n++) {
            double t[3][4];
            for (long j = 0; j < 4; j++) {
                double s[4];
                for (long i = 0; i < 4; i++) s[i] = total[(4 * i + j) * c_out + n];
                t[0][j] = s[0] + 0.5 * (s[1] + s[2]);
                t[1][j] = 0.5 * (s[1] - s[2]);
                t[2][j] = 0.5 * (s[1] + s[2]) + s[3];
            }
            for (long i = 0; i < 3; i++) {
                double row[3] = {t[i][0] + 0.5 * (t[i][1] + t[i][2]), 0.5 * (t[i][1] - t[i][2]),
                                 0.5 * (t[i][1] + t[i][2]) + t[i][3]};
                for (long j = 0; j < 3; j++)
                    dweight[((3 * i + j) * c_in + k) * c_out + n] = float(row[j]);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------

// If `normed` is given, y is the gradient of the result of that norm. Then its sums (2, c_out) for
// norm_backward() are made too, and c_out must be whole vectors.
void convolve(const Images& images, const float* weight, const float* bias, float* y, long c_out,
              const Images* normed = nullptr, const float* mean = nullptr, double* sums = nullptr) {
    long c_in = images.channels, tiles = tiles_of(images), all = rows_of(images);
    long wide_in = round_up(c_in, LANES), wide_out = round_up(c_out, LANES);
    Places kernels = transform_weight(weight, c_in, c_out);
    Buffer wide_bias(wide_out);
    std::copy_n(bias, c_out, wide_bias.at(0));
    long rows = std::max(1L, CACHE / (wide_in + wide_out) / tiles);     // of tiles, at a time
    long most = round_up(rows * tiles, BLOCK), count = normed ? 2 * c_out : 0;
    bool is_aligned = c_out % LANES == 0 && uintptr_t(y) % sizeof(vec) == 0;
    bool far = is_aligned && all * tiles * 16 * c_out >= FAR;
    std::vector<double> totals((all + rows - 1) / rows * count);
    #pragma omp parallel
    {
        Lines lines(images);
        Places inputs(most, wide_in), products(most, wide_out);
        #pragma omp for schedule(static)
        for (long first = 0; first < all; first += rows) {
            long end = std::min(all, first + rows);
            for (long row = first; row < end; row++)
                transform_input(lines, row, tiles, inputs, (row - first) * tiles);
            Ahead ahead[2] = {lines_ahead(images, 2 * end + 1, 2 * rows)};
            if (normed) ahead[1] = lines_ahead(*normed, 2 * first, 2 * rows);
            for (long i = 0; i < PLACES; i++)
                multiply<AsItIs>((end - first) * tiles, kernels.blocks, inputs.at(i), inputs.block,
                                 kernels.at(i), kernels.block, products.at(i), products.block, c_in,
                                 false, ahead[normed ? i % 2 : 0]);

            // the sums of the norm, while its gradient is at hand
            Buffer some(count);
            auto look = [&](const float* at, long c, vec left, vec right) {
                if (!normed) return;
                const float *x = normed->values + (at - y), *scale = normed->scale + c;
                vec total = get(some.at(c)), product = get(some.at(c_out + c));
                for (vec g : {left, right}) {
                    vec value = get(x);
                    g = value * get(scale) + get(normed->shift + c) > 0 ? g : g * normed->slope;
                    total += g;
                    product += g * (value - get(mean + c));
                    x += c_out;
                }
                put(some.at(c), total);
                put(some.at(c_out + c), product);
            };
            for (long row = first; row < end; row++)
                transform_output(products, (row - first) * tiles, wide_bias,
                                 y + row * 2 * images.width * c_out, images.width, c_out, far,
                                 look);
            for (long i = 0; i < count; i++) totals[first / rows * count + i] = *some.at(i);
        }
        wait_for_far();
    }
    for (long i = 0; i < count; i++) {
        sums[i] = 0;
        for (size_t part = i; part < totals.size(); part += count) sums[i] += totals[part];
    }
}

// dweight (3, 3, c_in, c_out) and dbias (c_out), of the images and the gradients of the result
void weigh(const Images& images, const Images& gradients, float* dweight, float* dbias) {
    long c_in = images.channels, c_out = gradients.channels, tiles = tiles_of(images);
    long wide_in = round_up(c_in, LANES), wide_out = round_up(c_out, LANES), all = rows_of(images);
    long rows = std::max(1L, CACHE / (wide_in + wide_out) / tiles);

    // parts are summed by one thread each, in float32, and then together in float64
    long parts = std::clamp(all * tiles / 192, 1L, 16L), per_part = (all + parts - 1) / parts;
    std::vector<Places> sums(parts, Places(round_up(c_in, BLOCK), wide_out));
    std::vector<double> biases(parts * c_out);
    #pragma omp parallel
    {
        Lines lines(images), gradient_lines(gradients);
        Places inputs(rows * tiles, wide_in), outputs(rows * tiles, wide_out);
        #pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            long last = std::min(all, (part + 1) * per_part);
            for (long first = part * per_part; first < last; first += rows) {
                long end = std::min(last, first + rows), count = (end - first) * tiles;
                for (long row = first; row < end; row++) {
                    long at = (row - first) * tiles;
                    transform_input(lines, row, tiles, inputs, at);
                    transform_gradient(gradient_lines, row, tiles, outputs, at);
                }
                Ahead ahead[2] = {lines_ahead(images, 2 * end + 1, 2 * rows),
                                  lines_ahead(gradients, 2 * end, 2 * rows)};
                for (long i = 0; i < PLACES; i++)
                    multiply<Transposed>(c_in, outputs.blocks, inputs.at(i), inputs.block,
                                         outputs.at(i), outputs.block, sums[part].at(i),
                                         sums[part].block, count, true, ahead[i % 2]);
                // at place 5 is the sum of a tile's four gradients
                for (long n = 0; n < c_out; n++) {
                    float total = 0;
                    for (long tile = 0; tile < count; tile++) total += *outputs.at(5, tile, n);
                    biases[part * c_out + n] += total;
                }
            }
        }
    }
    for (long n = 0; n < c_out; n++) {
        double total = 0;
        for (long part = 0; part < parts; part++) total += biases[part * c_out + n];
        dbias[n] = float(total);
    }
    transform_sums(sums, dweight, c_in, c_out);
}

}  // namespace

// what fused.py calls; scale and shift may be null: the input is taken as it is
extern "C" {

void winograd_forward(const float* x, const float* scale, const float* shift, float slope,
                      const float* weight, const float* bias, float* y, long count, long height,
                      long width, long c_in, long c_out) {
    convolve({x, count, height, width, c_in, scale, shift, slope}, weight, bias, y, c_out);
}

// the gradient dx of a convolution's input, from dy; x ... mean describe the norm before it
void winograd_gradient(const float* dy, const float* weight, const float* bias, float* dx,
                       const float* x, const float* scale, const float* shift, float slope,
                       const float* mean, double* sums, long count, long height, long width,
                       long c_in, long c_out) {
    Images normed{x, count, height, width, c_out, scale, shift, slope};
    convolve({dy, count, height, width, c_in}, weight, bias, dx, c_out, &normed, mean, sums);
}

void winograd_weight(const float* x, const float* scale, const float* shift, float slope,
                     const float* dy, float* dweight, float* dbias, long count, long height,
                     long width, long c_in, long c_out) {
    weigh({x, count, height, width, c_in, scale, shift, slope}, {dy, count, height, width, c_out},
          dweight, dbias);
}

}
