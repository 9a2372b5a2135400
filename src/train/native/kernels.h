// The table of kernels: one per kind of element, for the CPU or for a GPU. table.rs has the same types in the same order.

#pragma once

#include <cstdint>

struct relora_adamw {
    double learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, gradient_scale;
};

// The heads of a micro-batch: several of the queries may share one of keys and values.
struct relora_heads {
    int64_t seqs, length, queries, key_values, dim;
};

struct relora_kernels {
    void (*rms_norm)(int threads, int64_t rows, int64_t width, const void* x, const void* branch, const void* weight,
                     double eps, void* sum, void* y, void* rstd);
    void (*rms_norm_backward)(int threads, int64_t rows, int64_t width, const void* dy, const void* x,
                              const void* rstd, const void* weight, void* dx, void* cast, void* dweight);
    void (*rotate)(int threads, int64_t rows, int64_t row_width, int64_t seq_len, int64_t heads, int64_t dim, void* x,
                   const void* cos, const void* sin, int backwards);
    void (*swiglu)(int threads, int64_t rows, int64_t width, const void* gate_up, void* product);
    void (*swiglu_backward)(int threads, int64_t rows, int64_t width, const void* dproduct, void* gate_up);
    void (*cross_entropy)(int threads, int64_t rows, int64_t vocab, int64_t row_width, void* logits,
                          const int64_t* targets, double scale, void* losses);
    void (*embedding_backward)(int threads, int64_t rows, int64_t width, const int64_t* ids, const void* dx,
                               void* dweight);
    void (*add_scaled)(int threads, int64_t len, const void* from, const void* delta, double scale, void* to);
    void (*add_scaled_int8)(int threads, int64_t rows, int64_t width, const int8_t* codes, const void* scales,
                            const void* delta, double scale, void* to);
    void (*add_scaled_nf4)(int threads, int64_t len, const uint8_t* codes, const void* scales, const void* levels,
                           const void* delta, double scale, void* to);
    void (*accumulate)(int threads, int64_t len, const void* from, void* sum);
    void (*dropout)(int threads, int64_t rows, int64_t width, int64_t row_width, int64_t seq_len, const void* x,
                    double keep, uint64_t seed, uint32_t first_seq, uint32_t place, int adds, void* to);
    void (*adamw)(int threads, int64_t len, int64_t decayed_len, void* value, const void* gradient, void* exp_avg,
                  void* exp_avg_sq, const struct relora_adamw* settings);
    void (*square_sum)(int threads, int64_t len, const void* x, double* partials);  // their sum is meant

    // Attention as a whole, on the CPU. Every thread has so many bytes of the memory.
    int64_t (*attention_bytes)(int64_t length, int64_t dim);
    void (*attention)(int threads, const struct relora_heads* heads, const void* qkv, double scale, void* mixed,
                      void* log_sums, void* memory);
    void (*attention_backward)(int threads, const struct relora_heads* heads, const void* qkv, const void* dmixed,
                               const void* log_sums, double scale, void* dqkv, void* memory);
    // Null on the CPU. On a GPU attention is products, and between them this.
    void (*causal_softmax)(int threads, int64_t rows, int64_t width, const void* scores, double scale,
                           void* probabilities);
    void (*causal_softmax_backward)(int threads, int64_t rows, int64_t width, const void* probabilities, double scale,
                                    void* gradients);
};
