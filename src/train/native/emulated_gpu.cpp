// The kernels of kernels.cu run on the CPU, for the tests: a block at a time, its threads by turns.
//
// Every thread of a block is a context of its own, which goes on to the next one where it waits for the others. That is
// what a kernel may rely on, in the worst order: threads share what is __shared__, and nothing else is in step.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define EMULATED_GPU
#define THREADS 8
#define KERNEL static void
#define DEVICE inline
#define __shared__ static

namespace {

struct Index {
    int x;
};

Index blockIdx, threadIdx;

struct bf16 {
    unsigned short bits;
};

struct Adamw {
    double learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, gradient_scale;
};

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

using std::exp;
using std::log;
using std::sqrt;

constexpr int STACK_BYTES = 64 * 1024;

ucontext_t contexts[THREADS], caller;
char stacks[THREADS][STACK_BYTES];
bool is_done[THREADS];

// Lets the next thread go on until it waits in its turn; when all have, this one does.
void __syncthreads() {
    int self = threadIdx.x, next = (self + 1) % THREADS;
    while (is_done[next]) next = (next + 1) % THREADS;
    if (next == self) return;
    threadIdx.x = next;
    swapcontext(&contexts[self], &contexts[next]);
}

struct Call {
    void (*run)(void (*kernel)(), void** arguments);
    void (*kernel)();
    void** arguments;
} call;

// A thread from its start to its end; the last one returns to the caller.
void run_thread() {
    int self = threadIdx.x;
    call.run(call.kernel, call.arguments);
    is_done[self] = true;
    for (int step = 1; step < THREADS; ++step) {
        int next = (self + step) % THREADS;
        if (!is_done[next]) {
            threadIdx.x = next;
            setcontext(&contexts[next]);
        }
    }
    setcontext(&caller);
}

void run_block() {
    for (int thread = 0; thread < THREADS; ++thread) {
        is_done[thread] = false;
        getcontext(&contexts[thread]);
        contexts[thread].uc_stack.ss_sp = stacks[thread];
        contexts[thread].uc_stack.ss_size = STACK_BYTES;
        contexts[thread].uc_link = nullptr;
        makecontext(&contexts[thread], run_thread, 0);
    }
    threadIdx.x = 0;
    swapcontext(&caller, &contexts[0]);
}

// Calls a kernel with its arguments as a launch gets them: an address for each.
template <class... A, size_t... I>
void unpack(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A> void run(void (*kernel)(), void** arguments) {
    unpack(reinterpret_cast<void (*)(A...)>(kernel), arguments, std::index_sequence_for<A...>());
}

struct Entry {
    const char* name;
    void (*run)(void (*kernel)(), void** arguments);
    void (*kernel)();
};

template <class... A> Entry entry(const char* name, void (*kernel)(A...)) {
    return {name, run<A...>, reinterpret_cast<void (*)()>(kernel)};
}

#define ENTRY(name) entry(#name, name)
#define ENTRIES                                                                                                      \
    {ENTRY(rms_norm),           ENTRY(rms_norm_backward), ENTRY(rms_norm_weight), ENTRY(add_rows),                   \
     ENTRY(rotate),             ENTRY(causal_softmax),    ENTRY(causal_softmax_backward), ENTRY(swiglu),             \
     ENTRY(swiglu_backward),    ENTRY(cross_entropy),     ENTRY(embedding_backward), ENTRY(add_scaled),              \
     ENTRY(add_scaled_int8),    ENTRY(add_scaled_nf4),    ENTRY(accumulate), ENTRY(dropout), ENTRY(adamw),           \
     ENTRY(square_sum)}

namespace in_float {
using T = float;
using Sum = float;
#include "kernels.cu"
const Entry entries[] = ENTRIES;
}  // namespace in_float

namespace in_double {
using T = double;
using Sum = double;
#include "kernels.cu"
const Entry entries[] = ENTRIES;
}  // namespace in_double

namespace in_bf16 {
using T = bf16;
using Sum = float;
#include "kernels.cu"
const Entry entries[] = ENTRIES;
}  // namespace in_bf16

}  // namespace

// Runs a kernel over this many blocks; `kind` is 0 for float, 1 for double, 2 for bf16. False if there is none of that
// name. Only one call at a time.
extern "C" bool relora_emulate_gpu(int kind, const char* name, uint32_t num_blocks, void** arguments) {
    const Entry* tables[] = {in_float::entries, in_double::entries, in_bf16::entries};
    for (size_t i = 0; i < sizeof in_float::entries / sizeof(Entry); ++i) {
        const Entry& found = tables[kind][i];
        if (strcmp(found.name, name) != 0) continue;
        call = {found.run, found.kernel, arguments};
        for (uint32_t block = 0; block < num_blocks; ++block) {
            blockIdx.x = int(block);
            run_block();
        }
        return true;
    }
    return false;
}
