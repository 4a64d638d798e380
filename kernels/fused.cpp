// Fused BatchNorm and LeakyReLU, forward and backward. Called by layers.py.
//
// x is (pixels, channels) contiguous, float32 or bfloat16. A training step reads or writes
// each value eight times; PyTorch's separate functions do so fourteen times.
//
// Large images have few channels, fewer than the lanes of a vector. So all loops run over rows of
// `period` values, a multiple of both the channels and the vector length. Sums are accumulated in
// float32 within a block of rows and in float64 across blocks, in a fixed order, so the result does
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fused.h"

namespace {

const long VECTOR = 64;         // values: a multiple of every CPU's vector length
const long BLOCK = 64;          // rows that are accumulated in float32
const long PARTS = 64;          // maximum; one thread accumulates each part

// Divides n values into rows of `period`, and rows into parts.
struct Rows {
    long n, channels, period, count, per_part, parts;

    Rows(long n, long channels) : n(n), channels(channels) {
        period = std::lcm(channels, VECTOR);
        count = (n + period - 1) / period;
        per_part = std::max(BLOCK, (count + PARTS - 1) / PARTS);
        parts = (count + per_part - 1) / per_part;
    }
    long length(long row) const { return std::min(period, n - row * period); }  // the last: less
    long end(long part) const { return std::min(count, (part + 1) * per_part); }

    // (channels) -> (period)
    std::vector<float> repeat(const std::vector<float>& per_channel) const {
        std::vector<float> row(period);
        for (long j = 0; j < period; j++) row[j] = per_channel[j % channels];
        return row;
    }
};

// Two sums over pixels, (channels) each: add(row, length, first, second) accumulates one row.
template <class Add>
void sum(const Rows& rows, Add add, std::vector<double>& first, std::vector<double>& second) {
    long period = rows.period;
    std::vector<double> firsts(rows.parts * period), seconds(rows.parts * period);
    #pragma omp parallel for schedule(static)
    for (long part = 0; part < rows.parts; part++) {
        std::vector<float> a(period), b(period);
        double *a_total = &firsts[part * period], *b_total = &seconds[part * period];
        for (long begin = part * rows.per_part; begin < rows.end(part); begin += BLOCK) {
            std::fill(a.begin(), a.end(), 0.0f);
            std::fill(b.begin(), b.end(), 0.0f);
            for (long row = begin; row < std::min(begin + BLOCK, rows.end(part)); row++)
                add(row, rows.length(row), a.data(), b.data());
            for (long j = 0; j < period; j++) {
                a_total[j] += a[j];
                b_total[j] += b[j];
            }
        }
    }
    first.assign(rows.channels, 0.0);
    second.assign(rows.channels, 0.0);
    for (long pixel = 0; pixel < rows.parts * period / rows.channels; pixel++) {
        for (long c = 0; c < rows.channels; c++) {
            first[c] += firsts[pixel * rows.channels + c];
            second[c] += seconds[pixel * rows.channels + c];
        }
    }
}

// Writes y row by row: work(offset of the row, length, to) computes one row into `to`.
template <class T, class Work>
void for_each_row(const Rows& rows, T* y, bool stream, Work work) {
    #pragma omp parallel
    {
        std::vector<T> buffer(rows.period);
        #pragma omp for schedule(static)
        for (long part = 0; part < rows.parts; part++) {
            for (long row = part * rows.per_part; row < rows.end(part); row++) {
                long at = row * rows.period, length = rows.length(row);
                work(at, length, stream ? buffer.data() : y + at);
                if (stream) stream_copy(buffer.data(), y + at, length * sizeof(T));
            }
        }
        stream_fence();
    }
}

// -------------------------------------------------------------------------------------------------
// kernels for one row; per-channel parameters come repeated, see Rows::repeat()

template <class T>
void measure_row(const T* x, long length, const float* pivot, float* sum, float* squares) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float deviation = load(x[j]) - pivot[j];
        sum[j] += deviation;
        squares[j] += deviation * deviation;
    }
}

template <class T>
void apply_row(const T* x, T* y, long length, const float* scale, const float* shift, float slope) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float z = load(x[j]) * scale[j] + shift[j];
        store(y + j, z > 0 ? z : z * slope);
    }
}

template <class T>
void gradients_row(const T* dy, const T* x, long length, const float* scale, const float* shift,
                   const float* mean, float slope, float* sum, float* products) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float value = load(x[j]), g = load(dy[j]);
        g = value * scale[j] + shift[j] > 0 ? g : g * slope;        // LeakyReLU
        sum[j] += g;
        products[j] += g * (value - mean[j]);
    }
}

template <class T>
void backward_row(const T* dy, const T* x, T* dx, long length, const float* scale,
                  const float* shift, const float* a, const float* b, float slope) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float value = load(x[j]), g = load(dy[j]);
        g = value * scale[j] + shift[j] > 0 ? g : g * slope;
        store(dx + j, scale[j] * g + a[j] * value + b[j]);
    }
}

// -------------------------------------------------------------------------------------------------

// Mean and biased variance, (channels), in one pass. Subtracting the mean of a few pixels first,
// which is close to the mean of all, avoids the cancellation of E[x^2] - E[x]^2.
template <class T>
void measure(const T* x, long n, long channels, float* mean, float* var) {
    Rows rows(n, channels);
    const long SAMPLES = 61;
    std::vector<float> pivot(channels);
    for (long i = 0; i < SAMPLES; i++) {
        const T* pixel = x + n / channels * i / SAMPLES * channels;
        for (long c = 0; c < channels; c++) pivot[c] += load(pixel[c]) / SAMPLES;
    }
    std::vector<float> pivot_row = rows.repeat(pivot);
    auto add = [&](long row, long length, float* first, float* second) {
        measure_row(x + row * rows.period, length, pivot_row.data(), first, second);
    };
    std::vector<double> sums, squares;
    sum(rows, add, sums, squares);
    double pixels = double(n) / channels;
    for (long c = 0; c < channels; c++) {
        double delta = sums[c] / pixels;
        mean[c] = float(pivot[c] + delta);
        var[c] = float(std::max(0.0, squares[c] / pixels - delta * delta));
        if (!std::isfinite(squares[c])) var[c] = NAN;       // max() would hide it
    }
}

// The normalisation as y = scale x + shift per channel, before the LeakyReLU.
void fold_bn(long channels, const float* weight, const float* bias, const float* mean,
             const float* var, float eps, std::vector<float>& scale, std::vector<float>& shift) {
    scale.resize(channels);
    shift.resize(channels);
    for (long c = 0; c < channels; c++) {
        scale[c] = weight[c] / std::sqrt(var[c] + eps);
        shift[c] = bias[c] - mean[c] * scale[c];
    }
}

template <class T>
void apply(const T* x, T* y, long n, long channels, const float* weight, const float* bias,
           const float* mean, const float* var, float eps, float slope) {
    Rows rows(n, channels);
    std::vector<float> scale, shift;
    fold_bn(channels, weight, bias, mean, var, eps, scale, shift);
    scale = rows.repeat(scale);
    shift = rows.repeat(shift);
    for_each_row(rows, y, n * long(sizeof(T)) >= STREAM_BYTES, [&](long at, long length, T* to) {
        apply_row(x + at, to, length, scale.data(), shift.data(), slope);
    });
}

// dx may be null if only dweight and dbias are needed. given_sums, if not null, are (2, channels),
// accumulated by another kernel: the sums over pixels of g, the gradient before the LeakyReLU, and
// of g (x - mean).
template <class T>
void backward(const T* dy, const T* x, T* dx, long n, long channels, const float* weight,
              const float* bias, const float* mean, const float* var, float eps, float slope,
              const double* given_sums, float* dweight, float* dbias) {
    Rows rows(n, channels);
    std::vector<float> scale, shift;
    fold_bn(channels, weight, bias, mean, var, eps, scale, shift);
    std::vector<float> scale_row = rows.repeat(scale), shift_row = rows.repeat(shift);
    std::vector<float> mean_row = rows.repeat(std::vector<float>(mean, mean + channels));
    auto add = [&](long row, long length, float* first, float* second) {
        long at = row * rows.period;
        gradients_row(dy + at, x + at, length, scale_row.data(), shift_row.data(), mean_row.data(),
                      slope, first, second);
    };
    std::vector<double> sums, products;
    if (given_sums) {
        sums.assign(given_sums, given_sums + channels);
        products.assign(given_sums + channels, given_sums + 2 * channels);
    } else {
        sum(rows, add, sums, products);
    }

    // with the gradients through mean and variance, dx = scale g + a x + b
    std::vector<float> a(channels), b(channels);
    double pixels = double(n) / channels;
    for (long c = 0; c < channels; c++) {
        double variance = double(var[c]) + eps;
        dbias[c] = float(sums[c]);
        dweight[c] = float(products[c] / std::sqrt(variance));
        double exact_a = -scale[c] * products[c] / (variance * pixels);
        a[c] = float(exact_a);
        b[c] = float(-scale[c] * sums[c] / pixels - exact_a * mean[c]);
    }
    if (!dx) return;
    std::vector<float> a_row = rows.repeat(a), b_row = rows.repeat(b);
    bool stream = dx != dy && n * long(sizeof(T)) >= STREAM_BYTES;
    for_each_row(rows, dx, stream, [&](long at, long length, T* to) {
        backward_row(dy + at, x + at, to, length, scale_row.data(), shift_row.data(), a_row.data(),
                     b_row.data(), slope);
    });
}

}  // namespace

// Called by layers.py. n is the number of values; half: they are bfloat16, else float32.
extern "C" {

void norm_measure(int half, const void* x, long n, long channels, float* mean, float* var) {
    if (half) measure((const bfloat16*)x, n, channels, mean, var);
    else measure((const float*)x, n, channels, mean, var);
}

void norm_apply(int half, const void* x, void* y, long n, long channels, const float* weight,
                const float* bias, const float* mean, const float* var, float eps, float slope) {
    if (half) apply((const bfloat16*)x, (bfloat16*)y, n, channels, weight, bias, mean, var, eps,
                    slope);
    else apply((const float*)x, (float*)y, n, channels, weight, bias, mean, var, eps, slope);
}

void norm_backward(int half, const void* dy, const void* x, void* dx, long n, long channels,
                   const float* weight, const float* bias, const float* mean, const float* var,
                   float eps, float slope, const double* given_sums, float* dweight, float* dbias) {
    if (half) backward((const bfloat16*)dy, (const bfloat16*)x, (bfloat16*)dx, n, channels, weight,
                       bias, mean, var, eps, slope, given_sums, dweight, dbias);
    else backward((const float*)dy, (const float*)x, (float*)dx, n, channels, weight, bias, mean,
                  var, eps, slope, given_sums, dweight, dbias);
}

}
