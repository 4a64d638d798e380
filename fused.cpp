// BatchNorm and LeakyReLU in one, forward and backward, for fused.py.
//
// x is (pixels, channels), one pixel after the other, in float32 or bfloat16. A step of training
// reads and writes each value eight times, where PyTorch's own functions do so fourteen times.
//
// Channels are few where pixels are many, too few for the processor's vectors. So the code goes
// over rows of `period` values, whole pixels and whole vectors at once. Sums are in float32 within
// a block of rows, and in float64 beyond. Blocks are summed in their order, so the result does not
// depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fused.h"

namespace {

const long VECTOR = 64;         // values; several vectors of the widest processors
const long BLOCK = 64;          // rows that are summed in float32
const long PARTS = 64;          // at most; each is summed by one thread

// Rows of whole pixels and whole vectors, and how they are divided.
struct Rows {
    long n, channels, period, count, per_part, parts;

    Rows(long n, long channels) : n(n), channels(channels) {
        period = std::lcm(channels, VECTOR);
        count = (n + period - 1) / period;
        per_part = std::max(BLOCK, (count + PARTS - 1) / PARTS);
        parts = (count + per_part - 1) / per_part;
    }
    long length(long row) const { return std::min(period, n - row * period); }  // the last is short
    long end(long part) const { return std::min(count, (part + 1) * per_part); }

    // one value per channel -> one per place in a row
    std::vector<float> spread(const std::vector<float>& of_channels) const {
        std::vector<float> wide(period);
        for (long j = 0; j < period; j++) wide[j] = of_channels[j % channels];
        return wide;
    }
};

// The sums over pixels of the two values that add(row, length, first, second) adds per place.
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

// Fills y with the rows that work(place of the first value, length, to) makes.
template <class T, class Work>
void each_row(const Rows& rows, T* y, bool far, Work work) {
    #pragma omp parallel
    {
        std::vector<T> made(rows.period);
        #pragma omp for schedule(static)
        for (long part = 0; part < rows.parts; part++) {
            for (long row = part * rows.per_part; row < rows.end(part); row++) {
                long at = row * rows.period, length = rows.length(row);
                work(at, length, far ? made.data() : y + at);
                if (far) copy_far(made.data(), y + at, length * sizeof(T));
            }
        }
        wait_for_far();
    }
}

// -------------------------------------------------------------------------------------------------
// one row each; a, b, c, d hold one value per place, as Rows::spread() gives them

template <class T>
void measure_row(const T* x, long length, const float* center, float* sum, float* squares) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float distance = load(x[j]) - center[j];
        sum[j] += distance;
        squares[j] += distance * distance;
    }
}

template <class T>
void apply_row(const T* x, T* y, long length, const float* a, const float* b, float slope) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float z = load(x[j]) * a[j] + b[j];
        store(y + j, z > 0 ? z : z * slope);
    }
}

template <class T>
void gradients_row(const T* dy, const T* x, long length, const float* a, const float* b,
                   const float* mean, float slope, float* sum, float* products) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float value = load(x[j]), g = load(dy[j]);
        g = value * a[j] + b[j] > 0 ? g : g * slope;        // through the LeakyReLU
        sum[j] += g;
        products[j] += g * (value - mean[j]);
    }
}

template <class T>
void backward_row(const T* dy, const T* x, T* dx, long length, const float* a, const float* b,
                  const float* c, const float* d, float slope) {
    #pragma omp simd
    for (long j = 0; j < length; j++) {
        float value = load(x[j]), g = load(dy[j]);
        g = value * a[j] + b[j] > 0 ? g : g * slope;
        store(dx + j, a[j] * g + c[j] * value + d[j]);
    }
}

// -------------------------------------------------------------------------------------------------

// mean and biased variance (channels), around the mean of some pixels: it is near the mean of all,
// so little is lost
template <class T>
void measure(const T* x, long n, long channels, float* mean, float* var) {
    Rows rows(n, channels);
    const long some = 61;
    std::vector<float> near(channels);
    for (long i = 0; i < some; i++) {
        const T* pixel = x + n / channels * i / some * channels;
        for (long c = 0; c < channels; c++) near[c] += load(pixel[c]) / some;
    }
    std::vector<float> wide = rows.spread(near);
    auto add = [&](long row, long length, float* first, float* second) {
        measure_row(x + row * rows.period, length, wide.data(), first, second);
    };
    std::vector<double> sums, squares;
    sum(rows, add, sums, squares);
    double pixels = double(n) / channels;
    for (long c = 0; c < channels; c++) {
        double off = sums[c] / pixels;
        mean[c] = float(near[c] + off);
        var[c] = float(std::max(0.0, squares[c] / pixels - off * off));
        if (!std::isfinite(squares[c])) var[c] = NAN;       // max() would hide it
    }
}

// what normalising is, per channel: y = scale x + shift, before the LeakyReLU
void line_of(long channels, const float* weight, const float* bias, const float* mean,
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
    line_of(channels, weight, bias, mean, var, eps, scale, shift);
    scale = rows.spread(scale);
    shift = rows.spread(shift);
    each_row(rows, y, n * long(sizeof(T)) >= FAR, [&](long at, long length, T* to) {
        apply_row(x + at, to, length, scale.data(), shift.data(), slope);
    });
}

// dx may be null: then only the gradients of weight and bias are asked for. So may `given` be; else
// it holds the sums over pixels of the gradient of the line and, (channels) further, of its product
// with the distance from the mean.
template <class T>
void backward(const T* dy, const T* x, T* dx, long n, long channels, const float* weight,
              const float* bias, const float* mean, const float* var, float eps, float slope,
              const double* given, float* dweight, float* dbias) {
    Rows rows(n, channels);
    std::vector<float> scale, shift;
    line_of(channels, weight, bias, mean, var, eps, scale, shift);
    std::vector<float> a = rows.spread(scale), b = rows.spread(shift);
    std::vector<float> middle = rows.spread(std::vector<float>(mean, mean + channels));
    auto add = [&](long row, long length, float* first, float* second) {
        long at = row * rows.period;
        gradients_row(dy + at, x + at, length, a.data(), b.data(), middle.data(), slope, first,
                      second);
    };
    std::vector<double> sums, products;
    if (given) {
        sums.assign(given, given + channels);
        products.assign(given + channels, given + 2 * channels);
    } else {
        sum(rows, add, sums, products);
    }

    // the gradient of normalising is again a line: dx = scale g + along x + still
    std::vector<float> along(channels), still(channels);
    double pixels = double(n) / channels;
    for (long c = 0; c < channels; c++) {
        double variance = double(var[c]) + eps;
        dbias[c] = float(sums[c]);
        dweight[c] = float(products[c] / std::sqrt(variance));
        double slant = -scale[c] * products[c] / (variance * pixels);
        along[c] = float(slant);
        still[c] = float(-scale[c] * sums[c] / pixels - slant * mean[c]);
    }
    if (!dx) return;
    std::vector<float> c = rows.spread(along), d = rows.spread(still);
    bool far = dx != dy && n * long(sizeof(T)) >= FAR;
    each_row(rows, dx, far, [&](long at, long length, T* to) {
        backward_row(dy + at, x + at, to, length, a.data(), b.data(), c.data(), d.data(), slope);
    });
}

}  // namespace

// what fused.py calls; n values, `half`: they are bfloat16
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
                   float eps, float slope, const double* given, float* dweight, float* dbias) {
    if (half) backward((const bfloat16*)dy, (const bfloat16*)x, (bfloat16*)dx, n, channels, weight,
                       bias, mean, var, eps, slope, given, dweight, dbias);
    else backward((const float*)dy, (const float*)x, (float*)dx, n, channels, weight, bias, mean,
                  var, eps, slope, given, dweight, dbias);
}

}
