// Dropout whose masks are drawn where they are used, from the place of an element in the run. A part of kernels.cpp.

// A word of 32 bits; what lies above them means nothing. A vector of AVX-512 multiplies 64 bits as they lie, so that a
// word in each needs no rearranging; others have the product of 32 bits alone.
#ifdef __AVX512DQ__
using Word = uint64_t;
#else
using Word = uint32_t;
#endif

// Philox4x32 with 10 rounds (Salmon et al. 2011): four words from a counter of four and a key of two.
inline void philox(Word (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t a = uint64_t(uint32_t(c[0])) * 0xD2511F53u, b = uint64_t(uint32_t(c[2])) * 0xCD9E8D57u;
        Word next0 = Word(b >> 32) ^ c[1] ^ key0, next2 = Word(a >> 32) ^ c[3] ^ key1;
        c[1] = Word(b);
        c[3] = Word(a);
        c[0] = next0;
        c[2] = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// kept = x · mask / keep. A function of its own, and x is read whether or not it is kept: else the compiler leaves this to
// one element at a time.
template <class T>
void mask(int64_t len, const T* x, const uint32_t* words, uint64_t threshold, Sum<T> scale, Sum<T>* kept) {
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
        Sum<T> scaled = load(x[i]) * scale;
        kept[i] = words[i] < threshold ? scaled : Sum<T>(0);
    }
}

// to = x · mask / keep, or with `adds` to += it. The mask of a row depends on its sequence, its position and `place`
// alone; word w of a row's block j is the draw of column w · quarter + j. Columns from `width` on are padding.
template <class T>
void dropout(int threads, int64_t rows, int64_t width, int64_t row_width, int64_t seq_len, const void* x_, double keep,
             uint64_t seed, uint32_t first_seq, uint32_t place, int adds, void* to_) {
    using S = Sum<T>;
    const T* xs = (const T*)x_;
    T* tos = (T*)to_;
    int64_t quarter = num_blocks(width, 4);
    uint64_t threshold = uint64_t(keep * 4294967296.0);
    S scale = S(1.0 / keep);
    constexpr int64_t LANES = 64;
    parallel_for(rows, 16 * width, threads, [=](int64_t row) {
        const T* x = xs + row * row_width;
        T* to = tos + row * row_width;
        for (int64_t i = width; !adds && i < row_width; ++i) store(to[i], S(0));
        uint32_t position = uint32_t(row % seq_len), seq = first_seq + uint32_t(row / seq_len);
        for (int64_t start = 0; start < quarter; start += LANES) {
            uint32_t words[4][LANES];
#pragma omp simd
            for (int64_t lane = 0; lane < LANES; ++lane) {
                Word c[4] = {Word(start + lane), position, place, seq};
                philox(c, uint32_t(seed), uint32_t(seed >> 32));
                for (int w = 0; w < 4; ++w) words[w][lane] = uint32_t(c[w]);
            }
            for (int w = 0; w < 4; ++w) {
                int64_t first = w * quarter + start, end = (w + 1) * quarter;
                end = end < width ? end : width;
                end = end < first + LANES ? end : first + LANES;
                S kept[LANES];
                mask(end - first, x + first, words[w], threshold, scale, kept);
#pragma omp simd
                for (int64_t i = first; i < end; ++i) store(to[i], adds ? load(to[i]) + kept[i - first] : kept[i - first]);
            }
        }
    });
}
