// 3x3 convolutions with padding 1 by Winograd's algorithm F(2x2, 3x3) (Lavin and Gray, arXiv
// 1509.09308), with 2.25 times fewer multiplications, in float32. Called by layers.py.
//
// Images are NHWC with even height and width. Output tiles are 2x2, input tiles overlapping 4x4:
//
//     output = A' [(G kernel G') * (B' input B)] A        * element-wise, summed over channels
//
// So a convolution is 16 matrix products, one per position in a tile. They run over a few rows of
// tiles at a time, which stay in the cache. BatchNorm and LeakyReLU of the input are fused into the
// pass that reads it. Results do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "fused.h"

namespace {

// -------------------------------------------------------------------------------------------------
// matrix products

const long BLOCK = LANES;           // accumulators (vectors) of a block of a product
const long POSITIONS = 16;          // in a 4x4 tile
const long CACHE = 8192;            // tiles x channels processed at a time, to fit the cache

inline long blocks_of(long channels) { return (channels + LANES - 1) / LANES; }

// Matrices are stored in blocks of LANES columns, (columns / LANES, rows, LANES): most strides are
// compile-time constants.

// One matrix (rows, columns) per tile position, columns padded to whole blocks. The stride between
// matrices is one cache line more than needed: powers of two would map to the same cache sets.
struct TileMatrices {
    long blocks, block, stride;     // number of blocks; floats per block and per matrix
    Buffer values;

    TileMatrices(long rows, long columns)
        : blocks(blocks_of(columns)), block(rows * LANES), stride(blocks * block + 16),
          values(POSITIONS * stride) {}
    float* at(long position, long row = 0, long column = 0) {
        return values.at(position * stride + column / LANES * block + row * LANES + column % LANES);
    }
};

// How to read the left matrix of a product, as stored or transposed: the strides of rows, columns
// and LANES columns (advance()), and the offset of row i.
struct AsStored {
    static const long ROW = LANES, COLUMN = 1;
    static long advance(long block) { return block; }
    static long row(long i, long) { return i * LANES; }
};
struct Transposed {
    static const long ROW = 1, COLUMN = LANES;
    static long advance(long) { return LANES * LANES; }
    static long row(long i, long block) { return i / LANES * block + i % LANES; }
};

// c = a b or c += a b, where c has BLOCK / N rows and N blocks. Prefetches at about the rate that
// memory delivers.
template <class A, long N>
inline void multiply_block(const float* a, long a_block, const float* b, long b_block, float* c,
                           long c_block, long depth, bool accumulate, Prefetch& prefetch) {
    const long ROWS = BLOCK / N;
    vec sums[ROWS][N];
    for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < N; j++)
            sums[i][j] = accumulate ? vload(c + j * c_block + i * LANES) : vec{};
    for (long left = depth; left > 0; left -= LANES, a += A::advance(a_block)) {
        const float* x = a;
        for (long i = 0; i < 8; i++) prefetch.next();
        for (long k = std::min(left, LANES); k > 0; k--, x += A::COLUMN, b += LANES) {
            vec right[N];
            for (long j = 0; j < N; j++) right[j] = vload(b + j * b_block);
            for (long i = 0; i < ROWS; i++)
                for (long j = 0; j < N; j++) sums[i][j] += x[i * A::ROW] * right[j];
        }
    }
    for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < N; j++) vstore(c + j * c_block + i * LANES, sums[i][j]);
}

// The same for all rows and blocks, two blocks at a time. Computes up to BLOCK - 1 extra rows, so c
// needs space for them.
template <class A>
void multiply(long rows, long blocks, const float* a, long a_block, const float* b, long b_block,
              float* c, long c_block, long depth, bool accumulate, Prefetch& prefetch) {
    for (; blocks > 1; blocks -= 2, b += 2 * b_block, c += 2 * c_block)
        for (long i = 0; i < rows; i += BLOCK / 2)
            multiply_block<A, 2>(a + A::row(i, a_block), a_block, b, b_block, c + i * LANES,
                                 c_block, depth, accumulate, prefetch);
    for (long i = 0; blocks == 1 && i < rows; i += BLOCK)
        multiply_block<A, 1>(a + A::row(i, a_block), a_block, b, b_block, c + i * LANES, c_block,
                             depth, accumulate, prefetch);
}

// -------------------------------------------------------------------------------------------------
// lines of images

inline long tiles_per_row(const Images& images) { return images.width / 2; }
inline long tile_rows(const Images& images) { return images.count * images.height / 2; }

// Normalised lines of images, with zero lines above and below and channels padded to whole vectors.
// The last four lines are cached.
class Lines {
    const Images& images;
    std::vector<Buffer> cache;
    Buffer zeros;
    long cached[4] = {-1, -1, -1, -1};

    void fill(const float* from, float* to, long padded) const {
        const long width = images.width, channels = images.channels;
        const long vectorised = channels / LANES * LANES;
        const float *scale = images.scale, *shift = images.shift, slope = images.slope;
        for (long f = 0; f < width; f++, from += channels, to += padded) {
            if (!scale) {
                std::copy_n(from, channels, to);
                continue;
            }
            for (long c = 0; c < vectorised; c += LANES) {
                vec z = vload(from + c) * vload(scale + c) + vload(shift + c);
                vstore(to + c, z > 0 ? z : z * slope);
            }
            for (long c = vectorised; c < channels; c++) {
                float z = from[c] * scale[c] + shift[c];
                to[c] = z > 0 ? z : z * slope;
            }
        }
    }

public:
    const long channels;        // padded

    explicit Lines(const Images& images)
        : images(images), cache(4, Buffer(images.width * round_up(images.channels, LANES))),
          zeros(images.width * round_up(images.channels, LANES)),
          channels(round_up(images.channels, LANES)) {}

    // (width, channels): line `offset` of a row of tiles, -1 to 2
    const float* get_line(long row, long offset) {
        long image = row / (images.height / 2), line = row % (images.height / 2) * 2 + offset;
        if (line < 0 || line >= images.height) return zeros.at(0);
        long number = image * images.height + line, slot = number % 4;
        const float* from = images.values + number * images.width * images.channels;
        if (!images.scale && images.channels == channels) return from;
        if (cached[slot] != number) fill(from, cache[slot].at(0), channels);
        cached[slot] = number;
        return cache[slot].at(0);
    }
};

// -------------------------------------------------------------------------------------------------
// tiles

// B' input B of one row of tiles, into rows `at` ... of `tiles`
void transform_input(Lines& lines, long row, long count, TileMatrices& tiles, long at) {
    const float* line[4];
    for (long i = 0; i < 4; i++) line[i] = lines.get_line(row, i - 1);
    // copied to locals, which stores cannot alias
    const long channels = lines.channels, stride = tiles.stride;
    for (long c = 0; c < channels; c += LANES) {
        float* block = tiles.at(0, at, c);
        vec t[4][4];
        auto column = [&](long f, long j) {
            vec d[4];
            for (long i = 0; i < 4; i++) d[i] = vload(line[i] + f * channels + c);
            t[0][j] = d[0] - d[2];
            t[1][j] = d[1] + d[2];
            t[2][j] = d[2] - d[1];
            t[3][j] = d[1] - d[3];
        };
        for (long i = 0; i < 4; i++) t[i][2] = vec{};       // zero padding
        column(0, 3);
        for (long tile = 0; tile < count; tile++) {
            // the last two columns of a tile are the first two of the next
            for (long i = 0; i < 4; i++) {
                t[i][0] = t[i][2];
                t[i][1] = t[i][3];
            }
            column(2 * tile + 1, 2);
            if (tile + 1 < count) column(2 * tile + 2, 3);
            else for (long i = 0; i < 4; i++) t[i][3] = vec{};
            float* to = block + tile * LANES;
            for (long i = 0; i < 4; i++) {
                vstore(to + 4 * i * stride, t[i][0] - t[i][2]);
                vstore(to + (4 * i + 1) * stride, t[i][1] + t[i][2]);
                vstore(to + (4 * i + 2) * stride, t[i][2] - t[i][1]);
                vstore(to + (4 * i + 3) * stride, t[i][1] - t[i][3]);
            }
        }
    }
}

// A gradient A' of one row of 2x2 tiles
void transform_gradient(Lines& lines, long row, long count, TileMatrices& tiles, long at) {
    const float *upper = lines.get_line(row, 0), *lower = lines.get_line(row, 1);
    const long channels = lines.channels, stride = tiles.stride;
    for (long c = 0; c < channels; c += LANES) {
        float* block = tiles.at(0, at, c);
        for (long tile = 0; tile < count; tile++) {
            vec t[4][2];
            for (long j = 0; j < 2; j++) {
                vec a = vload(upper + (2 * tile + j) * channels + c);
                vec b = vload(lower + (2 * tile + j) * channels + c);
                t[0][j] = a;
                t[1][j] = a + b;
                t[2][j] = a - b;
                t[3][j] = -b;
            }
            float* to = block + tile * LANES;
            for (long i = 0; i < 4; i++) {
                vstore(to + 4 * i * stride, t[i][0]);
                vstore(to + (4 * i + 1) * stride, t[i][0] + t[i][1]);
                vstore(to + (4 * i + 2) * stride, t[i][0] - t[i][1]);
                vstore(to + (4 * i + 3) * stride, -t[i][1]);
            }
        }
    }
}

// A' products A + bias: two output lines, y (2, width, channels). For each pair of pixels, calls
// visit(address in y, channel, left vector, right vector).
template <class Visit>
void transform_output(TileMatrices& tiles, long at, const Buffer& bias, float* y, long width,
                      long channels, bool stream, Visit visit) {
    const long stride = tiles.stride, block = tiles.block;
    for (long tile = 0; tile < width / 2; tile++) {
        const float* from = tiles.at(0, at + tile);
        for (long c = 0; c < channels; c += LANES, from += block) {
            vec t[2][4];
            for (long j = 0; j < 4; j++) {
                vec m[4];
                for (long i = 0; i < 4; i++) m[i] = vload(from + (4 * i + j) * stride);
                t[0][j] = m[0] + m[1] + m[2];
                t[1][j] = m[1] - m[2] - m[3];
            }
            for (long i = 0; i < 2; i++) {
                vec left = t[i][0] + t[i][1] + t[i][2] + vload(bias.at(c));
                vec right = t[i][1] - t[i][2] - t[i][3] + vload(bias.at(c));
                float* to = y + (i * width + 2 * tile) * channels + c;
                visit(to, c, left, right);
                if (stream) {
                    stream_store(to, left);
                    stream_store(to + channels, right);
                } else if (c + LANES <= channels) {
                    vstore(to, left);
                    vstore(to + channels, right);
                } else for (long k = 0; c + k < channels; k++) {
                    to[k] = left[k];
                    to[channels + k] = right[k];
                }
            }
        }
    }
}

// G kernel G' for weight (3, 3, c_in, c_out)
TileMatrices transform_weight(const float* weight, long c_in, long c_out) {
    TileMatrices to(c_in, c_out);
    const long columns = round_up(c_out, LANES);
    #pragma omp parallel for schedule(static)
    for (long k = 0; k < c_in; k++) {
        Buffer taps(9 * columns);       // (9, columns), zero-padded
        for (long i = 0; i < 9; i++)
            std::copy_n(weight + (i * c_in + k) * c_out, c_out, taps.at(i * columns));
        for (long n = 0; n < columns; n += LANES) {
            vec t[4][3];
            for (long j = 0; j < 3; j++) {
                vec g[3];
                for (long i = 0; i < 3; i++) g[i] = vload(taps.at((3 * i + j) * columns + n));
                t[0][j] = g[0];
                t[1][j] = 0.5f * (g[0] + g[1] + g[2]);
                t[2][j] = 0.5f * (g[0] - g[1] + g[2]);
                t[3][j] = g[2];
            }
            for (long i = 0; i < 4; i++) {
                vstore(to.at(4 * i, k, n), t[i][0]);
                vstore(to.at(4 * i + 1, k, n), 0.5f * (t[i][0] + t[i][1] + t[i][2]));
                vstore(to.at(4 * i + 2, k, n), 0.5f * (t[i][0] - t[i][1] + t[i][2]));
                vstore(to.at(4 * i + 3, k, n), t[i][2]);
            }
        }
    }
    return to;
}

// dweight (3, 3, c_in, c_out) = G' sums G, summed over all parts
void transform_sums(std::vector<TileMatrices>& sums, float* dweight, long c_in, long c_out) {
    #pragma omp parallel for schedule(static)
    for (long k = 0; k < c_in; k++) {
        std::vector<double> total(POSITIONS * c_out);
        for (TileMatrices& part : sums)
            for (long i = 0; i < POSITIONS; i++)
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

// The convolution. If `normed` is given, y is the gradient of the output of that norm, and the sums
// (2, c_out) that norm_backward() takes are accumulated; c_out must then be a multiple of LANES.
void convolve(const Images& images, const float* weight, const float* bias, float* y, long c_out,
              const Images* normed = nullptr, const float* mean = nullptr, double* sums = nullptr) {
    long c_in = images.channels, tiles = tiles_per_row(images), n_rows = tile_rows(images);
    long padded_in = round_up(c_in, LANES), padded_out = round_up(c_out, LANES);
    TileMatrices kernels = transform_weight(weight, c_in, c_out);
    Buffer padded_bias(padded_out);
    std::copy_n(bias, c_out, padded_bias.at(0));
    long rows = std::max(1L, CACHE / (padded_in + padded_out) / tiles);   // per step
    long max_tiles = round_up(rows * tiles, BLOCK), count = normed ? 2 * c_out : 0;
    bool is_aligned = c_out % LANES == 0 && uintptr_t(y) % sizeof(vec) == 0;
    bool stream = is_aligned && n_rows * tiles * 16 * c_out >= STREAM_BYTES;
    std::vector<double> totals((n_rows + rows - 1) / rows * count);
    #pragma omp parallel
    {
        Lines lines(images);
        TileMatrices inputs(max_tiles, padded_in), products(max_tiles, padded_out);
        #pragma omp for schedule(static)
        for (long first = 0; first < n_rows; first += rows) {
            long end = std::min(n_rows, first + rows);
            for (long row = first; row < end; row++)
                transform_input(lines, row, tiles, inputs, (row - first) * tiles);
            Prefetch prefetch[2] = {prefetch_lines(images, 2 * end + 1, 2 * rows)};
            if (normed) prefetch[1] = prefetch_lines(*normed, 2 * first, 2 * rows);
            for (long i = 0; i < POSITIONS; i++)
                multiply<AsStored>((end - first) * tiles, kernels.blocks, inputs.at(i),
                                   inputs.block, kernels.at(i), kernels.block, products.at(i),
                                   products.block, c_in, false, prefetch[normed ? i % 2 : 0]);

            // sums for the norm, while its gradient is in registers
            Buffer partial(count);
            auto visit = [&](const float* at, long c, vec left, vec right) {
                if (!normed) return;
                const float *x = normed->values + (at - y), *scale = normed->scale + c;
                vec total = vload(partial.at(c)), product = vload(partial.at(c_out + c));
                for (vec g : {left, right}) {
                    vec value = vload(x);
                    g = value * vload(scale) + vload(normed->shift + c) > 0 ? g : g * normed->slope;
                    total += g;
                    product += g * (value - vload(mean + c));
                    x += c_out;
                }
                vstore(partial.at(c), total);
                vstore(partial.at(c_out + c), product);
            };
            for (long row = first; row < end; row++)
                transform_output(products, (row - first) * tiles, padded_bias,
                                 y + row * 2 * images.width * c_out, images.width, c_out, stream,
                                 visit);
            for (long i = 0; i < count; i++) totals[first / rows * count + i] = *partial.at(i);
        }
        stream_fence();
    }
    for (long i = 0; i < count; i++) {
        sums[i] = 0;
        for (size_t part = i; part < totals.size(); part += count) sums[i] += totals[part];
    }
}

// dweight (3, 3, c_in, c_out) and dbias (c_out) from images and the gradient of the output
void weight_gradient(const Images& images, const Images& gradients, float* dweight, float* dbias) {
    long c_in = images.channels, c_out = gradients.channels, tiles = tiles_per_row(images);
    long padded_in = round_up(c_in, LANES), padded_out = round_up(c_out, LANES);
    long n_rows = tile_rows(images);
    long rows = std::max(1L, CACHE / (padded_in + padded_out) / tiles);

    // one thread accumulates each part, in float32; parts are added in float64, in order
    long parts = std::clamp(n_rows * tiles / 192, 1L, 16L), per_part = (n_rows + parts - 1) / parts;
    std::vector<TileMatrices> sums(parts, TileMatrices(round_up(c_in, BLOCK), padded_out));
    std::vector<double> biases(parts * c_out);
    #pragma omp parallel
    {
        Lines lines(images), gradient_lines(gradients);
        TileMatrices inputs(rows * tiles, padded_in), outputs(rows * tiles, padded_out);
        #pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            long last = std::min(n_rows, (part + 1) * per_part);
            for (long first = part * per_part; first < last; first += rows) {
                long end = std::min(last, first + rows), count = (end - first) * tiles;
                for (long row = first; row < end; row++) {
                    long at = (row - first) * tiles;
                    transform_input(lines, row, tiles, inputs, at);
                    transform_gradient(gradient_lines, row, tiles, outputs, at);
                }
                Prefetch prefetch[2] = {prefetch_lines(images, 2 * end + 1, 2 * rows),
                                  prefetch_lines(gradients, 2 * end, 2 * rows)};
                for (long i = 0; i < POSITIONS; i++)
                    multiply<Transposed>(c_in, outputs.blocks, inputs.at(i), inputs.block,
                                         outputs.at(i), outputs.block, sums[part].at(i),
                                         sums[part].block, count, true, prefetch[i % 2]);
                // position 5 holds the sum of a tile's four gradients
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

// Called by layers.py. Without a norm, scale and shift are null.
extern "C" {

void winograd_forward(const float* x, const float* scale, const float* shift, float slope,
                      const float* weight, const float* bias, float* y, long count, long height,
                      long width, long c_in, long c_out) {
    convolve({x, count, height, width, c_in, scale, shift, slope}, weight, bias, y, c_out);
}

// dx from dy and the flipped weight; x ... mean describe the norm before the convolution.
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
    weight_gradient({x, count, height, width, c_in, scale, shift, slope},
                    {dy, count, height, width, c_out}, dweight, dbias);
}

}
