// Elements as kernels.cpp reads, writes and raises e to them. It includes this within its unnamed namespace.

struct bf16 {
    uint16_t bits;
};

template <class T> struct SumOf { using type = T; };
template <> struct SumOf<bf16> { using type = float; };
template <class T> using Sum = typename SumOf<T>::type;

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }
inline void store(bf16& to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    to.bits = uint16_t(x != x ? 0x7fc0 : rounded >> 16);
}

// How e^x is computed: as 2^n · e^r with |r| <= ln 2 / 2, the second by its Taylor series. Outside of [low, high] x is
// moved there.
template <class S> struct Exp;
template <> struct Exp<float> {
    using Int = int32_t;
    static constexpr int degree = 7, mantissa_bits = 23, bias = 127;
    static constexpr float low = -87.0f, high = 88.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <> struct Exp<double> {
    using Int = int64_t;
    static constexpr int degree = 13, mantissa_bits = 52, bias = 1023;
    static constexpr double low = -708.0, high = 709.0, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10;
};

constexpr double inverse_factorial(int n) { return n == 0 ? 1.0 : inverse_factorial(n - 1) / n; }

template <class S, int K> inline S taylor(S r) {
    if constexpr (K == Exp<S>::degree) {
        return S(inverse_factorial(K));
    } else {
        return S(inverse_factorial(K)) + r * taylor<S, K + 1>(r);
    }
}

template <class S> inline S exp_of(S x) {
    using E = Exp<S>;
    x = x < E::low ? E::low : x;  // a NaN passes both
    x = x > E::high ? E::high : x;
    S n = std::rint(x * S(1.4426950408889634));
    S r = (x - n * E::ln2_high) - n * E::ln2_low;
    typename E::Int bits = (typename E::Int(n) + E::bias) << E::mantissa_bits;
    S power;
    memcpy(&power, &bits, sizeof power);
    return taylor<S, 0>(r) * power;
}
