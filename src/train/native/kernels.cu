// The fused kernels of kernels.cpp for a GPU: what a thread does there for a row, a block of threads does here.
//
// NVRTC compiles this file when a run begins, for the kind that its matrix products read and write: T is float, double
// or bf16, Sum what is accumulated (float, or double for double), THREADS the size of every block. The tests compile it
// for the CPU (emulated_gpu.cpp). Every sum is taken in the same order each time, and nothing is atomic: results do not
// depend on how blocks are scheduled.

#ifndef EMULATED_GPU
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define DEVICE __device__ __forceinline__

struct bf16 {
    unsigned short bits;
};

struct Adamw {
    double learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, gradient_scale;
};

using T = PRODUCT_TYPE;
using Sum = SUM_TYPE;
#endif

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;

DEVICE float load(float x) { return x; }
DEVICE double load(double x) { return x; }
DEVICE float load(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

DEVICE void store(float& to, float x) { to = x; }
DEVICE void store(double& to, double x) { to = x; }
DEVICE void store(bf16& to, float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    to.bits = (unsigned short)(x != x ? 0x7fc0 : rounded);
}

struct Add {
    template <class V> DEVICE V operator()(V a, V b) const { return a + b; }
};
struct Larger {
    template <class V> DEVICE V operator()(V a, V b) const { return a > b ? a : b; }
};

// Joins the values of a block's threads by halves; all threads get the result.
template <class V, class Join> DEVICE V of_block(V value, Join join) {
    __shared__ V values[THREADS];
    values[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) values[threadIdx.x] = join(values[threadIdx.x], values[threadIdx.x + half]);
    }
    __syncthreads();
    V joined = values[0];
    __syncthreads();  // before anybody uses the values again
    return joined;
}

// This thread's number among those of all blocks.
DEVICE i64 thread_number() { return i64(blockIdx.x) * THREADS + threadIdx.x; }

// A block to a row. y = x / rms(x) · weight, where x first becomes sum = x + branch if there is a branch.
KERNEL rms_norm(i64 width, const Sum* x, const T* branch, const Sum* weight, double eps, Sum* sum, T* y, Sum* rstd) {
    const i64 start = blockIdx.x * width;
    if (branch) {
        for (i64 i = threadIdx.x; i < width; i += THREADS) sum[start + i] = x[start + i] + load(branch[start + i]);
        x = sum;  // a thread reads what it wrote itself
    }
    Sum squares = 0;
    for (i64 i = threadIdx.x; i < width; i += THREADS) squares += x[start + i] * x[start + i];
    Sum scale = Sum(1) / sqrt(of_block(squares, Add()) / Sum(width) + Sum(eps));
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    for (i64 i = threadIdx.x; i < width; i += THREADS) store(y[start + i], x[start + i] * scale * weight[i]);
}

// A block to a row. dx += what comes through the norm, and `cast`, where it is given, receives dx in T.
KERNEL rms_norm_backward(i64 width, const T* dy, const Sum* x, const Sum* rstd, const Sum* weight, Sum* dx, T* cast) {
    const i64 start = blockIdx.x * width;
    Sum part = 0;
    for (i64 i = threadIdx.x; i < width; i += THREADS) part += load(dy[start + i]) * weight[i] * x[start + i];
    Sum scale = rstd[blockIdx.x], pull = of_block(part, Add()) * scale * scale * scale / Sum(width);
    for (i64 i = threadIdx.x; i < width; i += THREADS) {
        Sum gradient = dx[start + i] + load(dy[start + i]) * weight[i] * scale - x[start + i] * pull;
        dx[start + i] = gradient;
        if (cast) store(cast[start + i], gradient);
    }
}

// The gradient of a norm's weight, for a chunk of rows: partials (chunks, width). A thread to a column of a chunk.
KERNEL rms_norm_weight(i64 rows, i64 width, i64 chunk_rows, const T* dy, const Sum* x, const Sum* rstd, Sum* partials) {
    const i64 chunk = thread_number() / width, column = thread_number() % width;
    i64 end = (chunk + 1) * chunk_rows < rows ? (chunk + 1) * chunk_rows : rows;
    if (chunk * chunk_rows >= rows) return;
    Sum sum = 0;
    for (i64 row = chunk * chunk_rows; row < end; ++row) {
        sum += load(dy[row * width + column]) * x[row * width + column] * rstd[row];
    }
    partials[chunk * width + column] = sum;
}

// to += the sum of rows (num_rows, width), in their order. A thread to a column.
KERNEL add_rows(i64 num_rows, i64 width, const Sum* rows, Sum* to) {
    const i64 column = thread_number();
    if (column >= width) return;
    for (i64 row = 0; row < num_rows; ++row) to[column] += rows[row * width + column];
}

// A thread to a pair of elements. Turns the first `heads` heads of every row of x in place, or back.
KERNEL rotate(i64 rows, i64 row_width, i64 sequence_length, i64 heads, i64 half, T* x, const Sum* cos, const Sum* sin,
              int backwards) {
    const i64 number = thread_number(), row = number / (heads * half), pair = number % (heads * half);
    if (row >= rows) return;
    const i64 angle = row % sequence_length * half + pair % half;
    T* first = x + row * row_width + pair / half * 2 * half + pair % half;
    Sum a = load(first[0]), b = load(first[half]), c = cos[angle], s = backwards ? -sin[angle] : sin[angle];
    store(first[0], a * c - b * s);
    store(first[half], b * c + a * s);
}

// A block to a row. probabilities = softmax(scale · scores) of square matrices, row i of which sees its columns up to i.
KERNEL causal_softmax(i64 width, const Sum* scores, double scale_, T* probabilities) {
    const i64 start = blockIdx.x * width, seen = blockIdx.x % width + 1;
    const Sum scale = Sum(scale_);
    Sum largest = scores[start];
    for (i64 i = threadIdx.x; i < seen; i += THREADS) largest = Larger()(largest, scores[start + i]);
    largest = of_block(largest, Larger());
    Sum part = 0;
    for (i64 i = threadIdx.x; i < seen; i += THREADS) part += exp((scores[start + i] - largest) * scale);
    Sum share = Sum(1) / of_block(part, Add());
    for (i64 i = threadIdx.x; i < width; i += THREADS) {
        store(probabilities[start + i], i < seen ? exp((scores[start + i] - largest) * scale) * share : Sum(0));
    }
}

// A block to a row. Replaces the gradients of the probabilities by those of the scores.
KERNEL causal_softmax_backward(i64 width, const T* probabilities, double scale, T* gradients) {
    const i64 start = blockIdx.x * width, seen = blockIdx.x % width + 1;
    Sum part = 0;
    for (i64 i = threadIdx.x; i < seen; i += THREADS) part += load(probabilities[start + i]) * load(gradients[start + i]);
    Sum dot = of_block(part, Add());
    for (i64 i = threadIdx.x; i < width; i += THREADS) {
        Sum p = load(probabilities[start + i]), dp = load(gradients[start + i]);
        store(gradients[start + i], i < seen ? Sum(scale) * p * (dp - dot) : Sum(0));
    }
}

// A thread to an element. product = silu(gate) · up; a row of gate_up is a gate and then an up.
KERNEL swiglu(i64 rows, i64 width, const T* gate_up, T* product) {
    const i64 number = thread_number(), row = number / width;
    if (row >= rows) return;
    const T* gate = gate_up + number + row * width;
    Sum g = load(gate[0]);
    store(product[number], g / (Sum(1) + exp(-g)) * load(gate[width]));
}

// A thread to an element. Replaces gate and up by their gradients.
KERNEL swiglu_backward(i64 rows, i64 width, const T* dproduct, T* gate_up) {
    const i64 number = thread_number(), row = number / width;
    if (row >= rows) return;
    T* gate = gate_up + number + row * width;
    Sum g = load(gate[0]), u = load(gate[width]), d = load(dproduct[number]);
    Sum sigmoid = Sum(1) / (Sum(1) + exp(-g));
    store(gate[0], d * u * sigmoid * (Sum(1) + g * (Sum(1) - sigmoid)));
    store(gate[width], d * g * sigmoid);
}

// A block to a row. losses = -log softmax(logits)[target]. With a scale, the logits are replaced by their gradients
// times scale; columns from `vocab` on are padding, which no softmax sees.
KERNEL cross_entropy(i64 vocab, i64 row_width, T* all_logits, const i64* targets, double scale, Sum* losses) {
    T* logits = all_logits + blockIdx.x * row_width;
    const i64 target = targets[blockIdx.x];
    const Sum target_logit = load(logits[target]);
    Sum largest = load(logits[0]);
    for (i64 i = threadIdx.x; i < vocab; i += THREADS) largest = Larger()(largest, load(logits[i]));
    largest = of_block(largest, Larger());
    Sum part = 0;
    for (i64 i = threadIdx.x; i < vocab; i += THREADS) part += exp(load(logits[i]) - largest);
    const Sum log_sum = largest + log(of_block(part, Add()));
    if (threadIdx.x == 0) losses[blockIdx.x] = log_sum - target_logit;
    if (scale == 0) return;
    for (i64 i = threadIdx.x; i < row_width; i += THREADS) {
        Sum gradient = i < vocab ? exp(load(logits[i]) - log_sum) - Sum(i == target ? 1 : 0) : Sum(0);
        store(logits[i], gradient * Sum(scale));
    }
}

// A block to a row of dx. The first row with an identifier adds itself and all later ones with it to dweight.
KERNEL embedding_backward(i64 rows, i64 width, const i64* ids, const Sum* dx, Sum* dweight) {
    __shared__ bool hits[THREADS];
    const i64 first = blockIdx.x, id = ids[first];
    int is_later = 0;
    for (i64 row = threadIdx.x; row < first; row += THREADS) is_later |= ids[row] == id;
    if (of_block(is_later, Larger())) return;
    for (i64 start = first; start < rows; start += THREADS) {
        const i64 row = start + threadIdx.x;
        int is_hit = row < rows && ids[row] == id;
        hits[threadIdx.x] = is_hit;
        if (!of_block(is_hit, Larger())) continue;
        for (int hit = 0; hit < THREADS; ++hit) {
            if (!hits[hit]) continue;
            for (i64 i = threadIdx.x; i < width; i += THREADS) dweight[id * width + i] += dx[(start + hit) * width + i];
        }
        __syncthreads();
    }
}

// A thread to an element, here and below. to = from + scale · delta, a merged matrix.
KERNEL add_scaled(i64 len, const Sum* from, const T* delta, double scale, T* to) {
    const i64 i = thread_number();
    if (i < len) store(to[i], from[i] + Sum(scale) * load(delta[i]));
}

// The same of a matrix in int8, every row with a scale of its own.
KERNEL add_scaled_int8(i64 len, i64 width, const signed char* codes, const Sum* scales, const T* delta, double scale,
                       T* to) {
    const i64 i = thread_number();
    if (i < len) store(to[i], Sum(codes[i]) * scales[i / width] + Sum(scale) * load(delta[i]));
}

// The same of a matrix in NF4: two codes a byte, the first in the low half; 64 elements share a scale.
KERNEL add_scaled_nf4(i64 len, const unsigned char* codes, const Sum* scales, const Sum* levels, const T* delta,
                      double scale, T* to) {
    const i64 i = thread_number();
    if (i >= len) return;
    Sum level = levels[(codes[i / 2] >> (i % 2 * 4)) & 15];
    store(to[i], level * scales[i / 64] + Sum(scale) * load(delta[i]));
}

// sum += from, a gradient that a product left in T.
KERNEL accumulate(i64 len, const T* from, Sum* sum) {
    const i64 i = thread_number();
    if (i < len) sum[i] += load(from[i]);
}

// Philox4x32 with 10 rounds (Salmon et al. 2011): four words from a counter of four and a key of two.
DEVICE void philox(u32 (&c)[4], u32 key0, u32 key1) {
    for (int round = 0; round < 10; ++round) {
        u64 a = u64(c[0]) * 0xD2511F53u, b = u64(c[2]) * 0xCD9E8D57u;
        u32 next0 = u32(b >> 32) ^ c[1] ^ key0, next2 = u32(a >> 32) ^ c[3] ^ key1;
        c[1] = u32(b);
        c[3] = u32(a);
        c[0] = next0;
        c[2] = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// A thread to the draws of a counter, which are for four columns. to = x · mask / keep, or with `adds` to += it; the
// masks are those of the CPU. Columns from `width` on are padding.
KERNEL dropout(i64 rows, i64 width, i64 row_width, i64 sequence_length, const T* x, double keep, u64 seed,
               u32 first_seq, u32 place, int adds, T* to) {
    const i64 quarter = (width + 3) / 4, row = thread_number() / quarter, number = thread_number() % quarter;
    if (row >= rows) return;
    u32 words[4] = {u32(number), u32(row % sequence_length), place, first_seq + u32(row / sequence_length)};
    philox(words, u32(seed), u32(seed >> 32));
    const u64 threshold = u64(keep * 4294967296.0);
    const Sum scale = Sum(1.0 / keep);
    for (int word = 0; word < 4; ++word) {
        const i64 column = word * quarter + number, i = row * row_width + column;
        if (column >= width) continue;
        Sum kept = words[word] < threshold ? load(x[i]) * scale : Sum(0);
        store(to[i], adds ? load(to[i]) + kept : kept);
    }
    for (i64 i = width + number; !adds && i < row_width; i += quarter) store(to[row * row_width + i], Sum(0));
}

// One update of AdamW, as torch.optim.AdamW has it; the gradient is scaled first. Weight decay ends at decayed_len.
KERNEL adamw(i64 len, i64 decayed_len, Sum* value, const Sum* gradient, Sum* exp_avg, Sum* exp_avg_sq, Adamw o) {
    const i64 i = thread_number();
    if (i >= len) return;
    Sum kept = i < decayed_len ? value[i] * Sum(1 - o.learning_rate * o.weight_decay) : value[i];
    Sum g = gradient[i] * Sum(o.gradient_scale);
    Sum m = Sum(o.beta1) * exp_avg[i] + Sum(1 - o.beta1) * g;
    Sum v = Sum(o.beta2) * exp_avg_sq[i] + Sum(1 - o.beta2) * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    Sum root = Sum(1 / sqrt(o.correction2));
    value[i] = kept - Sum(o.learning_rate / o.correction1) * m / (sqrt(v) * root + Sum(o.eps));
}

// The sum of squares of a chunk: partials (chunks). A block to a chunk.
KERNEL square_sum(i64 len, i64 chunk_len, const Sum* x, double* partials) {
    const i64 start = blockIdx.x * chunk_len, end = start + chunk_len < len ? start + chunk_len : len;
    double part = 0;
    for (i64 i = start + threadIdx.x; i < end; i += THREADS) part += double(x[i]) * double(x[i]);
    part = of_block(part, Add());
    if (threadIdx.x == 0) partials[blockIdx.x] = part;
}
