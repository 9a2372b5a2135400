// Dropout whose masks are drawn where they are used, from the place of an element in the run. A part of kernels.cpp.

// Philox4x32 with 10 rounds (Salmon et al. 2011): four words from a counter of four and a key of two.
inline void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
        uint32_t next0 = uint32_t(b >> 32) ^ c[1] ^ key0, next2 = uint32_t(a >> 32) ^ c[3] ^ key1;
        c[1] = uint32_t(b);
        c[3] = uint32_t(a);
        c[0] = next0;
        c[2] = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
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
                uint32_t c[4] = {uint32_t(start + lane), position, place, seq};
                philox(c, uint32_t(seed), uint32_t(seed >> 32));
                for (int w = 0; w < 4; ++w) words[w][lane] = c[w];
            }
            for (int w = 0; w < 4; ++w) {
                int64_t first = w * quarter + start, end = (w + 1) * quarter;
                end = end < width ? end : width;
                end = end < first + LANES ? end : first + LANES;
#pragma omp simd
                for (int64_t i = first; i < end; ++i) {
                    S kept = words[w][i - first] < threshold ? load(x[i]) * scale : S(0);
                    store(to[i], adds ? load(to[i]) + kept : kept);
                }
            }
        }
    });
}
