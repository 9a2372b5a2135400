// The fused kernels of a training step on the CPU: what libtorch does in several passes over memory is done in one.
//
// build.rs compiles this file once per instruction set. Everything but the table lies in an unnamed namespace and uses
// no template of the standard library, so that the linker never takes a function made for one set for another's.
//
// T is what matrix products read and write (float, double or bf16), Sum what is accumulated: float, or double for
// double. Tensors are contiguous, rows after rows. Work is divided by rows, by heads or by blocks of a fixed size, and
// what blocks leave is added in their order: results do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace {

#include "numbers.h"

// Calls f(0) to f(n - 1). With little work, on this thread alone.
template <class F> inline void parallel_for(int64_t n, int64_t work_each, int threads, const F& f) {
    constexpr int64_t least_work = 32768;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * work_each >= least_work)
    for (int64_t i = 0; i < n; ++i) f(i);
}

// Functions of their own: within nested loops the compiler leaves such sums to one element at a time.
template <class S> S sum_of_squares(const S* x, int64_t len) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < len; ++i) sum += x[i] * x[i];
    return sum;
}

template <class T> Sum<T> weighted_dot(const T* y, const Sum<T>* weight, const Sum<T>* x, int64_t len) {
    Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < len; ++i) sum += load(y[i]) * weight[i] * x[i];
    return sum;
}

constexpr int64_t BLOCK = 16384;

inline int64_t num_blocks(int64_t len, int64_t block) { return (len + block - 1) / block; }
inline int64_t end_of(int64_t b, int64_t len, int64_t block) { return (b + 1) * block < len ? (b + 1) * block : len; }

// y = x / rms(x) · weight, where x first becomes sum = x + branch if there is a branch. rstd is 1 / rms of every row.
template <class T>
void rms_norm(int threads, int64_t rows, int64_t width, const void* x_, const void* branch_, const void* weight_,
              double eps, void* sum_, void* y_, void* rstd_) {
    using S = Sum<T>;
    const S *xs = (const S*)x_, *weight = (const S*)weight_;
    const T* branches = (const T*)branch_;
    S *sums = (S*)sum_, *rstds = (S*)rstd_;
    T* ys = (T*)y_;
    parallel_for(rows, width, threads, [=](int64_t row) {
        const S* x = xs + row * width;
        T* y = ys + row * width;
        if (branches) {
            const T* branch = branches + row * width;
            S* sum = sums + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) sum[i] = x[i] + load(branch[i]);
            x = sum;
        }
        // Apart from the sum above, so that a norm that is computed again has the same bits.
        S rstd = S(1) / std::sqrt(sum_of_squares(x, width) / S(width) + S(eps));
        rstds[row] = rstd;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(y[i], x[i] * rstd * weight[i]);
    });
}

// dx += what comes through the norm; dweight += its own. With n = x · rstd and g = dy · weight,
// dx = rstd (g - n · mean(g n)). `cast`, where it is given, receives dx in T.
template <class T>
void rms_norm_backward(int threads, int64_t rows, int64_t width, const void* dy_, const void* x_, const void* rstd_,
                       const void* weight_, void* dx_, void* cast_, void* dweight_) {
    using S = Sum<T>;
    constexpr int64_t CHUNKS = 16;
    const T* dys = (const T*)dy_;
    const S *xs = (const S*)x_, *rstds = (const S*)rstd_, *weight = (const S*)weight_;
    S *dxs = (S*)dx_, *dweight = (S*)dweight_;
    T* casts = (T*)cast_;
    S* partials = dweight ? new S[CHUNKS * width]() : nullptr;
    int64_t chunk_rows = num_blocks(rows, CHUNKS);
    parallel_for(CHUNKS, chunk_rows * width, threads, [=](int64_t chunk) {
        for (int64_t row = chunk * chunk_rows; row < end_of(chunk, rows, chunk_rows); ++row) {
            const T* dy = dys + row * width;
            const S* x = xs + row * width;
            S* dx = dxs + row * width;
            S rstd = rstds[row];
            S pull = weighted_dot<T>(dy, weight, x, width) * rstd * rstd * rstd / S(width);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) dx[i] += load(dy[i]) * weight[i] * rstd - x[i] * pull;
            if (casts) {
                T* cast = casts + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) store(cast[i], dx[i]);
            }
            if (partials) {
                S* partial = partials + chunk * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) partial[i] += load(dy[i]) * x[i] * rstd;
            }
        }
    });
    for (int64_t chunk = 0; partials && chunk < CHUNKS; ++chunk) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) dweight[i] += partials[chunk * width + i];
    }
    delete[] partials;
}

// Turns the first `heads` heads of every row of x in place, each element i of a half together with i + dim / 2. A row's
// position is its number modulo seq_len. cos and sin are (positions, dim / 2); backwards the turn is undone.
template <class T>
void rotate(int threads, int64_t rows, int64_t row_width, int64_t seq_len, int64_t heads, int64_t dim, void* x_,
            const void* cos_, const void* sin_, int backwards) {
    using S = Sum<T>;
    T* xs = (T*)x_;
    const S *coss = (const S*)cos_, *sins = (const S*)sin_;
    int64_t half = dim / 2;
    S sign = backwards ? S(-1) : S(1);
    parallel_for(rows, heads * dim, threads, [=](int64_t row) {
        const S *cos = coss + row % seq_len * half, *sin = sins + row % seq_len * half;
        for (int64_t head = 0; head < heads; ++head) {
            T *first = xs + row * row_width + head * dim, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                S a = load(first[i]), b = load(second[i]), s = sign * sin[i];
                store(first[i], a * cos[i] - b * s);
                store(second[i], b * cos[i] + a * s);
            }
        }
    });
}

#include "attention.h"

// product = silu(gate) · up; a row of gate_up is a gate and then an up, each of this width.
template <class T> void swiglu(int threads, int64_t rows, int64_t width, const void* gate_up_, void* product_) {
    using S = Sum<T>;
    const T* gate_ups = (const T*)gate_up_;
    T* products = (T*)product_;
    parallel_for(rows, 2 * width, threads, [=](int64_t row) {
        const T *gate = gate_ups + 2 * row * width, *up = gate + width;
        T* product = products + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            S g = load(gate[i]);
            store(product[i], g / (S(1) + exp_of(-g)) * load(up[i]));
        }
    });
}

// Replaces gate and up by their gradients.
template <class T>
void swiglu_backward(int threads, int64_t rows, int64_t width, const void* dproduct_, void* gate_up_) {
    using S = Sum<T>;
    const T* dproducts = (const T*)dproduct_;
    T* gate_ups = (T*)gate_up_;
    parallel_for(rows, 3 * width, threads, [=](int64_t row) {
        T *gate = gate_ups + 2 * row * width, *up = gate + width;
        const T* dproduct = dproducts + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            S g = load(gate[i]), u = load(up[i]), d = load(dproduct[i]);
            S sigmoid = S(1) / (S(1) + exp_of(-g));
            store(gate[i], d * u * sigmoid * (S(1) + g * (S(1) - sigmoid)));
            store(up[i], d * g * sigmoid);
        }
    });
}

// losses = -log softmax(logits)[target] of every row. With a scale, the logits are replaced by their gradients times
// scale; columns from `vocab` on are padding, which no softmax sees.
template <class T>
void cross_entropy(int threads, int64_t rows, int64_t vocab, int64_t row_width, void* logits_, const int64_t* targets,
                   double scale, void* losses_) {
    using S = Sum<T>;
    T* all_logits = (T*)logits_;
    S* losses = (S*)losses_;
    parallel_for(rows, 4 * vocab, threads, [=](int64_t row) {
        T* logits = all_logits + row * row_width;
        S largest = load(logits[0]);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < vocab; ++i) largest = load(logits[i]) > largest ? load(logits[i]) : largest;
        S sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocab; ++i) sum += exp_of(load(logits[i]) - largest);
        S log_sum = largest + std::log(sum);
        losses[row] = log_sum - load(logits[targets[row]]);
        if (scale == 0) return;
        S target_gradient = (exp_of(load(logits[targets[row]]) - log_sum) - S(1)) * S(scale);
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i) store(logits[i], exp_of(load(logits[i]) - log_sum) * S(scale));
        store(logits[targets[row]], target_gradient);
        for (int64_t i = vocab; i < row_width; ++i) store(logits[i], S(0));
    });
}

// dweight[ids[row]] += dx[row], in the order of the rows: every thread has columns of its own.
template <class T>
void embedding_backward(int threads, int64_t rows, int64_t width, const int64_t* ids, const void* dx_, void* dweight_) {
    using S = Sum<T>;
    constexpr int64_t COLUMNS = 64;
    const S* dx = (const S*)dx_;
    S* dweight = (S*)dweight_;
    parallel_for(num_blocks(width, COLUMNS), rows * COLUMNS, threads, [=](int64_t block) {
        int64_t end = end_of(block, width, COLUMNS);
        for (int64_t row = 0; row < rows; ++row) {
            S* to = dweight + ids[row] * width;
            const S* from = dx + row * width;
#pragma omp simd
            for (int64_t i = block * COLUMNS; i < end; ++i) to[i] += from[i];
        }
    });
}

// to = T(from + scale · delta), a merged matrix.
template <class T>
void add_scaled(int threads, int64_t len, const void* from_, const void* delta_, double scale, void* to_) {
    using S = Sum<T>;
    const S* from = (const S*)from_;
    const T* delta = (const T*)delta_;
    T* to = (T*)to_;
    parallel_for(num_blocks(len, BLOCK), BLOCK, threads, [=](int64_t block) {
        int64_t end = end_of(block, len, BLOCK);
#pragma omp simd
        for (int64_t i = block * BLOCK; i < end; ++i)
            store(to[i], from[i] + S(scale) * load(delta[i]));
    });
}

// The same of a matrix in int8, every row with a scale of its own.
template <class T>
void add_scaled_int8(int threads, int64_t rows, int64_t width, const int8_t* codes, const void* scales_,
                     const void* delta_, double scale, void* to_) {
    using S = Sum<T>;
    const S* scales = (const S*)scales_;
    const T* deltas = (const T*)delta_;
    T* tos = (T*)to_;
    parallel_for(rows, width, threads, [=](int64_t row) {
        const int8_t* code = codes + row * width;
        const T* delta = deltas + row * width;
        T* to = tos + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(to[i], S(code[i]) * scales[row] + S(scale) * load(delta[i]));
    });
}

// The same of a matrix in NF4: two codes a byte, the first in the low half; 64 elements share a scale.
template <class T>
void add_scaled_nf4(int threads, int64_t len, const uint8_t* codes, const void* scales_, const void* levels_,
                    const void* delta_, double scale, void* to_) {
    using S = Sum<T>;
    const S *scales = (const S*)scales_, *levels = (const S*)levels_;
    const T* delta = (const T*)delta_;
    T* to = (T*)to_;
    parallel_for(num_blocks(len, 64), 64, threads, [=](int64_t block) {
        for (int64_t i = block * 64; i < end_of(block, len, 64); ++i) {
            S level = levels[(codes[i / 2] >> (i % 2 * 4)) & 15];
            store(to[i], level * scales[block] + S(scale) * load(delta[i]));
        }
    });
}

// sum += from, a gradient that a product left in T.
template <class T> void accumulate(int threads, int64_t len, const void* from_, void* sum_) {
    using S = Sum<T>;
    const T* from = (const T*)from_;
    S* sum = (S*)sum_;
    parallel_for(num_blocks(len, BLOCK), BLOCK, threads, [=](int64_t block) {
        int64_t end = end_of(block, len, BLOCK);
#pragma omp simd
        for (int64_t i = block * BLOCK; i < end; ++i) sum[i] += load(from[i]);
    });
}

#include "dropout.h"

// One update of AdamW, as torch.optim.AdamW has it; the gradient is scaled first. Weight decay ends at decayed_len.
template <class T>
void adamw(int threads, int64_t len, int64_t decayed_len, void* value_, const void* gradient_, void* exp_avg_,
           void* exp_avg_sq_, const struct relora_adamw* o) {
    using S = Sum<T>;
    S *value = (S*)value_, *exp_avg = (S*)exp_avg_, *exp_avg_sq = (S*)exp_avg_sq_;
    const S* gradient = (const S*)gradient_;
    S scale = S(o->gradient_scale), beta1 = S(o->beta1), beta2 = S(o->beta2), eps = S(o->eps);
    S rest1 = S(1 - o->beta1), rest2 = S(1 - o->beta2);
    S step_size = S(o->learning_rate / o->correction1), root = S(1 / std::sqrt(o->correction2));
    S kept = S(1 - o->learning_rate * o->weight_decay);
    parallel_for(num_blocks(len, BLOCK), BLOCK, threads, [=](int64_t block) {
        int64_t start = block * BLOCK, end = end_of(block, len, BLOCK);
        int64_t decayed_end = decayed_len < end ? decayed_len : end;
#pragma omp simd
        for (int64_t i = start; i < decayed_end; ++i) value[i] *= kept;
#pragma omp simd
        for (int64_t i = start; i < end; ++i) {
            S g = gradient[i] * scale;
            S m = beta1 * exp_avg[i] + rest1 * g, v = beta2 * exp_avg_sq[i] + rest2 * g * g;
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
            value[i] -= step_size * m / (std::sqrt(v) * root + eps);
        }
    });
}

// The sum of squares, in two levels: one sum over all elements loses digits.
template <class T> void square_sum(int threads, int64_t len, const void* x_, double* sum) {
    using S = Sum<T>;
    constexpr int64_t SMALL = 1024;
    const S* x = (const S*)x_;
    double* partials = new double[num_blocks(len, BLOCK)];
    parallel_for(num_blocks(len, BLOCK), BLOCK, threads, [=](int64_t block) {
        double partial = 0;
        int64_t end = end_of(block, len, BLOCK);
        for (int64_t start = block * BLOCK; start < end; start += SMALL) {
            partial += sum_of_squares(x + start, start + SMALL < end ? SMALL : end - start);
        }
        partials[block] = partial;
    });
    *sum = 0;
    for (int64_t block = 0; block < num_blocks(len, BLOCK); ++block) *sum += partials[block];
    delete[] partials;
}

template <class T> constexpr relora_kernels table() {
    return {rms_norm<T>,
            rms_norm_backward<T>,
            rotate<T>,
            swiglu<T>,
            swiglu_backward<T>,
            cross_entropy<T>,
            embedding_backward<T>,
            add_scaled<T>,
            add_scaled_int8<T>,
            add_scaled_nf4<T>,
            accumulate<T>,
            dropout<T>,
            adamw<T>,
            square_sum<T>,
            attention_bytes<T>,
            attention<T>,
            attention_backward<T>,
            nullptr,
            nullptr};
}

constexpr relora_kernels tables[] = {table<float>(), table<double>(), table<bf16>()};

}  // namespace

// RELORA_TABLE is a name per instruction set: relora_kernels_avx512 and so on.
extern "C" const relora_kernels* RELORA_TABLE() { return tables; }
