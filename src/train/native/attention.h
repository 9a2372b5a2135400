// Causal attention, forward and backward, without the square of all scores in memory: a tile of queries at a time meets
// the keys up to its own end, and what the backward pass needs of the softmax is computed again from the logarithms of
// its sums (FlashAttention, arXiv 2205.14135; but rows of scores are whole here, so that nothing has to be rescaled).
//
// A part of kernels.cpp. In shapes: t positions, d elements of a head. What products read lies in cells, as the
// processor's multiply-add takes them: one element, or where it adds the products of two bf16 at once, a pair.

#if defined(__AVX512F__)
#define RELORA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RELORA_VECTOR_BYTES 32
#else
#define RELORA_VECTOR_BYTES 16
#endif

template <class S> struct VectorOf {
    typedef S type __attribute__((vector_size(RELORA_VECTOR_BYTES), aligned(sizeof(S)), may_alias));
    static constexpr int64_t lanes = RELORA_VECTOR_BYTES / sizeof(S);
};
template <class S> using Vector = typename VectorOf<S>::type;

template <class T> struct CellsOf {
    using type = Sum<T>;
    static constexpr int64_t pair = 1;
};
#ifdef __AVX512BF16__
template <> struct CellsOf<bf16> {
    using type = bf16;
    static constexpr int64_t pair = 2;
};
#endif
template <class T> using Cell = typename CellsOf<T>::type;
template <class T> constexpr int64_t PAIR = CellsOf<T>::pair;

// What products keep in registers: rows of two vectors.
constexpr int64_t TILE_ROWS = RELORA_VECTOR_BYTES == 64 ? 8 : 4;
template <class T> constexpr int64_t TILE_COLUMNS = 2 * VectorOf<Sum<T>>::lanes;
constexpr int64_t TILE_QUERIES = 64;

inline int64_t round_up(int64_t len, int64_t to) { return (len + to - 1) / to * to; }

// The left side of a product: pair k of row i begins at cells[PAIR · (i · row + k · step)].
template <class T> struct Left {
    const Cell<T>* cells;
    int64_t row, step;
};

template <class S> inline Vector<S> multiply_add(const S* left, const S* right, Vector<S> sum) {
    return sum + *left * *(const Vector<S>*)right;
}
#ifdef __AVX512BF16__
inline Vector<float> multiply_add(const bf16* left, const bf16* right, Vector<float> sum) {
    int32_t pair;
    memcpy(&pair, left, sizeof pair);
    __m512i pairs = _mm512_loadu_si512(right);
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
}
#endif

// c (m, n) = a b, or with `adds` +=, over so many pairs. b lies in panels of TILE_COLUMNS columns, each (panel_pairs,
// columns, PAIR). Rows and columns are rounded up to whole tiles: what lies there may be anything, as it reaches only
// rows and columns of c that nobody reads. What is summed over must be there, or be zero.
template <class T>
void product(int64_t m, int64_t n, int64_t pairs, Left<T> a, const Cell<T>* b, int64_t panel_pairs, bool adds,
             Sum<T>* c, int64_t c_row) {
    using V = Vector<Sum<T>>;
    constexpr int64_t lanes = VectorOf<Sum<T>>::lanes;
    for (int64_t j = 0; j < n; j += TILE_COLUMNS<T>) {
        for (int64_t i = 0; i < m; i += TILE_ROWS) {
            Sum<T>* to = c + i * c_row + j;
            V sums[TILE_ROWS][2];
#pragma GCC unroll 8
            for (int64_t r = 0; r < TILE_ROWS; ++r) {
                sums[r][0] = adds ? *(const V*)(to + r * c_row) : V{};
                sums[r][1] = adds ? *(const V*)(to + r * c_row + lanes) : V{};
            }
            const Cell<T> *left = a.cells + i * a.row * PAIR<T>, *right = b + j * panel_pairs * PAIR<T>;
            for (int64_t k = 0; k < pairs; ++k) {
#pragma GCC unroll 8
                for (int64_t r = 0; r < TILE_ROWS; ++r) {
                    const Cell<T>* of_row = left + r * a.row * PAIR<T>;
                    sums[r][0] = multiply_add(of_row, right, sums[r][0]);
                    sums[r][1] = multiply_add(of_row, right + lanes * PAIR<T>, sums[r][1]);
                }
                left += a.step * PAIR<T>;
                right += TILE_COLUMNS<T> * PAIR<T>;
            }
#pragma GCC unroll 8
            for (int64_t r = 0; r < TILE_ROWS; ++r) {
                *(V*)(to + r * c_row) = sums[r][0];
                *(V*)(to + r * c_row + lanes) = sums[r][1];
            }
        }
    }
}

inline void set_cell(float& to, float x) { to = x; }
inline void set_cell(double& to, double x) { to = x; }
inline void set_cell(float& to, bf16 x) { to = load(x); }
inline void set_cell(bf16& to, bf16 x) { to = x; }
inline void set_cell(bf16& to, float x) { store(to, x); }

// Rows of a head (rows, d) as the left side of a product over their elements.
template <class T> Left<T> pack_left(int64_t rows, int64_t d, const T* x, int64_t x_row, Cell<T>* to) {
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
        for (int64_t k = 0; k < d; ++k) set_cell(to[i * d + k], x[i * x_row + k]);
    }
    return {to, d / PAIR<T>, 1};
}

// The same as the right side of such a product: column j is row j.
template <class T> void pack_transposed(int64_t rows, int64_t d, const T* x, int64_t x_row, Cell<T>* to) {
    constexpr int64_t columns = TILE_COLUMNS<T>;
    for (int64_t j = 0; j < rows; ++j) {
        Cell<T>* column = to + j / columns * columns * d + j % columns * PAIR<T>;
        const T* row = x + j * x_row;
        for (int64_t k = 0; k < d; k += PAIR<T>) {
            if constexpr (PAIR<T> == 2)
                memcpy((void*)(column + k * columns), row + k, 2 * sizeof(T));
            else
                set_cell(column[k * columns], row[k]);
        }
    }
}

// A pair to each element of two rows, of which the second is zero where there is none.
template <class T> inline void interleave(int64_t len, const bf16* first, const bf16* second, Cell<T>* to) {
    if (second) {
#pragma omp simd
        for (int64_t i = 0; i < len; ++i) {
            uint32_t pair = first[i].bits | uint32_t(second[i].bits) << 16;
            memcpy((void*)(to + 2 * i), &pair, sizeof pair);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < len; ++i) {
            uint32_t pair = first[i].bits;
            memcpy((void*)(to + 2 * i), &pair, sizeof pair);
        }
    }
}

// Rows of a head (rows, d) as the right side of a product over the rows.
template <class T> void pack_right(int64_t rows, int64_t d, const T* x, int64_t x_row, Cell<T>* to) {
    constexpr int64_t columns = TILE_COLUMNS<T>;
    int64_t panel_rows = round_up(rows, PAIR<T>);
    for (int64_t j = 0; j < d; j += columns) {
        int64_t width = d - j < columns ? d - j : columns;
        for (int64_t k = 0; k < rows; k += PAIR<T>) {
            const T* from = x + k * x_row + j;
            Cell<T>* step = to + j * panel_rows + k * columns;
            if constexpr (PAIR<T> == 2) {
                interleave<T>(width, from, k + 1 < rows ? from + x_row : nullptr, step);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) set_cell(step[i], from[i]);
            }
        }
    }
}

// A tile (rows, width) as the left side of a product over its rows, transposed.
template <class T> Left<T> transposed(int64_t rows, int64_t width, const Cell<T>* tile, int64_t row, Cell<T>* to) {
    if constexpr (PAIR<T> == 2) {
        for (int64_t k = 0; k < rows; k += 2) {
            const Cell<T>* first = tile + k * row;
            interleave<T>(width, first, k + 1 < rows ? first + row : nullptr, to + k * row);
        }
        return {to, 1, row};
    } else {
        return {tile, 1, row};
    }
}

template <class T> void store_rows(int64_t rows, int64_t d, const Sum<T>* x, int64_t x_row, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
        for (int64_t k = 0; k < d; ++k) store(to[i * to_row + k], x[i * x_row + k]);
    }
}

template <class T> struct AttentionSpace {
    int64_t keys, width;              // t and d, in whole tiles
    Sum<T> *scores, *dp;              // (queries of a tile, keys)
    Sum<T> *mixed, *dk, *dv;          // (queries or keys, width); mixed holds the gradients of queries, too
    Cell<T> *left, *right[2];         // a tile of queries, or of the gradients of what they mixed
    Cell<T> *p, *ds, *pairs;          // (queries of a tile, keys)
    Cell<T> *by_element[2], *by_key;  // all keys or values

    // Lies from the address `at` on, which is left behind its end.
    AttentionSpace(int64_t t, int64_t d, uintptr_t& at)
        : keys(round_up(t, TILE_COLUMNS<T>)), width(round_up(d, TILE_COLUMNS<T>)) {
        take(at, TILE_QUERIES * keys, scores, dp);
        take(at, TILE_QUERIES * width, mixed);
        take(at, keys * width, dk, dv);
        take(at, TILE_QUERIES * width, left, right[0], right[1]);
        take(at, TILE_QUERIES * keys, p, ds, pairs);
        take(at, keys * width, by_element[0], by_element[1], by_key);
    }

    // Arrays of this length.
    template <class... X> static void take(uintptr_t& at, int64_t len, X*&... arrays) {
        ((arrays = (X*)at, at += round_up(len * int64_t(sizeof(X)), 64)), ...);
    }
};

template <class T> int64_t attention_bytes(int64_t t, int64_t d) {
    uintptr_t end = 0;
    AttentionSpace<T>(t, d, end);
    return int64_t(end);
}

// Calls f(space, sequence, group) for every group of query heads that share keys and values.
template <class T, class F> void for_each_group(int threads, const relora_heads* h, void* memory, const F& f) {
    int64_t length = h->length, dim = h->dim, groups = h->key_values, tasks = h->seqs * groups;
    int64_t bytes = attention_bytes<T>(length, dim);
    parallel_for(threads, tasks * length * length * dim / threads, threads, [=](int64_t thread) {
        uintptr_t at = uintptr_t(memory) + thread * bytes;
        AttentionSpace<T> space(length, dim, at);
        for (int64_t task = thread * tasks / threads; task < (thread + 1) * tasks / threads; ++task)
            f(space, task / groups, task % groups);
    });
}

// p = softmax(scale · scores) of a row, which sees its first `seen` columns; the rest of its `width` is 0. Returns the
// logarithm of the sum. Writes over the scores.
template <class T> Sum<T> softmax(int64_t seen, int64_t width, Sum<T> scale, Sum<T>* scores, Cell<T>* p) {
    using S = Sum<T>;
    S largest = scores[0];
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < seen; ++j) largest = scores[j] > largest ? scores[j] : largest;
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; ++j) {
        scores[j] = exp_of((scores[j] - largest) * scale);
        sum += scores[j];
    }
    S share = S(1) / sum;
#pragma omp simd
    for (int64_t j = 0; j < seen; ++j) set_cell(p[j], scores[j] * share);
    for (int64_t j = seen; j < width; ++j) set_cell(p[j], S(0));
    return largest * scale + std::log(sum);
}

// p again, and from dp the gradient of the scores, scale · p (dp - sum of p dp).
template <class T>
void softmax_backward(int64_t seen, int64_t width, Sum<T> scale, Sum<T> log_sum, Sum<T>* scores, const Sum<T>* dp,
                      Cell<T>* p, Cell<T>* ds) {
    using S = Sum<T>;
    S dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < seen; ++j) {
        scores[j] = exp_of(scores[j] * scale - log_sum);
        dot += scores[j] * dp[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < seen; ++j) {
        set_cell(p[j], scores[j]);
        set_cell(ds[j], scale * scores[j] * (dp[j] - dot));
    }
    for (int64_t j = seen; j < width; ++j) {
        set_cell(p[j], S(0));
        set_cell(ds[j], S(0));
    }
}

// Mixes the values: a token's queries, keys and values lie side by side in a row, and so do its mixed heads. Keeps the
// logarithms of the softmax sums (seqs, queries, t).
template <class T>
void attention(int threads, const relora_heads* h, const void* qkv_, double scale, void* mixed_, void* log_sums_,
               void* memory) {
    int64_t t = h->length, d = h->dim, queries = h->queries, groups = h->key_values, share = queries / groups;
    int64_t row = (queries + 2 * groups) * d, mixed_row = queries * d;
    for_each_group<T>(threads, h, memory, [=](const AttentionSpace<T>& space, int64_t seq, int64_t group) {
        const T* qkv = (const T*)qkv_ + seq * t * row;
        const T *k = qkv + (queries + group) * d, *v = k + groups * d;
        pack_transposed(t, d, k, row, space.by_element[0]);
        pack_right(t, d, v, row, space.by_key);
        for (int64_t head = group * share; head < (group + 1) * share; ++head) {
            Sum<T>* log_sums = (Sum<T>*)log_sums_ + (seq * queries + head) * t;
            T* mixed = (T*)mixed_ + seq * t * mixed_row + head * d;
            for (int64_t start = 0; start < t; start += TILE_QUERIES) {
                int64_t end = start + TILE_QUERIES < t ? start + TILE_QUERIES : t, rows = end - start;
                Left<T> q = pack_left(rows, d, qkv + start * row + head * d, row, space.left);
                product<T>(rows, end, d / PAIR<T>, q, space.by_element[0], d / PAIR<T>, false, space.scores,
                           space.keys);
                for (int64_t i = 0; i < rows; ++i) {
                    Sum<T>* scores = space.scores + i * space.keys;
                    Cell<T>* p = space.p + i * space.keys;
                    log_sums[start + i] = softmax<T>(start + i + 1, round_up(end, PAIR<T>), Sum<T>(scale), scores, p);
                }
                product<T>(rows, d, round_up(end, PAIR<T>) / PAIR<T>, {space.p, space.keys / PAIR<T>, 1}, space.by_key,
                           round_up(t, PAIR<T>) / PAIR<T>, false, space.mixed, space.width);
                store_rows(rows, d, space.mixed, space.width, mixed + start * mixed_row, mixed_row);
            }
        }
    });
}

// Writes the gradients of queries, keys and values, in rows like theirs, from those of the mixed values.
template <class T>
void attention_backward(int threads, const relora_heads* h, const void* qkv_, const void* dmixed_,
                        const void* log_sums_, double scale, void* dqkv_, void* memory) {
    int64_t t = h->length, d = h->dim, queries = h->queries, groups = h->key_values, share = queries / groups;
    int64_t row = (queries + 2 * groups) * d, mixed_row = queries * d;
    for_each_group<T>(threads, h, memory, [=](const AttentionSpace<T>& space, int64_t seq, int64_t group) {
        const T* qkv = (const T*)qkv_ + seq * t * row;
        T* dqkv = (T*)dqkv_ + seq * t * row;
        int64_t of_k = (queries + group) * d, of_v = of_k + groups * d;
        pack_transposed(t, d, qkv + of_k, row, space.by_element[0]);
        pack_transposed(t, d, qkv + of_v, row, space.by_element[1]);
        pack_right(t, d, qkv + of_k, row, space.by_key);
        memset(space.dk, 0, sizeof(Sum<T>) * space.keys * space.width);
        memset(space.dv, 0, sizeof(Sum<T>) * space.keys * space.width);
        for (int64_t head = group * share; head < (group + 1) * share; ++head) {
            const Sum<T>* log_sums = (const Sum<T>*)log_sums_ + (seq * queries + head) * t;
            for (int64_t start = 0; start < t; start += TILE_QUERIES) {
                int64_t end = start + TILE_QUERIES < t ? start + TILE_QUERIES : t, rows = end - start;
                const T* q = qkv + start * row + head * d;
                Left<T> left = pack_left(rows, d, q, row, space.left);
                product<T>(rows, end, d / PAIR<T>, left, space.by_element[0], d / PAIR<T>, false, space.scores,
                           space.keys);
                const T* dmixed = (const T*)dmixed_ + (seq * t + start) * mixed_row + head * d;
                left = pack_left(rows, d, dmixed, mixed_row, space.left);
                product<T>(rows, end, d / PAIR<T>, left, space.by_element[1], d / PAIR<T>, false, space.dp, space.keys);
                int64_t width = round_up(end, TILE_COLUMNS<T>);
                for (int64_t i = 0; i < rows; ++i) {
                    int64_t at = i * space.keys;
                    softmax_backward<T>(start + i + 1, width, Sum<T>(scale), log_sums[start + i], space.scores + at,
                                        space.dp + at, space.p + at, space.ds + at);
                }
                product<T>(rows, d, round_up(end, PAIR<T>) / PAIR<T>, {space.ds, space.keys / PAIR<T>, 1},
                           space.by_key, round_up(t, PAIR<T>) / PAIR<T>, false, space.mixed, space.width);
                store_rows(rows, d, space.mixed, space.width, dqkv + start * row + head * d, row);

                int64_t row_pairs = round_up(rows, PAIR<T>) / PAIR<T>;
                pack_right(rows, d, q, row, space.right[0]);
                pack_right(rows, d, dmixed, mixed_row, space.right[1]);
                left = transposed<T>(rows, width, space.ds, space.keys, space.pairs);
                product<T>(end, d, row_pairs, left, space.right[0], row_pairs, true, space.dk, space.width);
                left = transposed<T>(rows, width, space.p, space.keys, space.pairs);
                product<T>(end, d, row_pairs, left, space.right[1], row_pairs, true, space.dv, space.width);
            }
        }
        store_rows(t, d, space.dk, space.width, dqkv + of_k, row);
        store_rows(t, d, space.dv, space.width, dqkv + of_v, row);
    });
}
