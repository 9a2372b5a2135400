// What reaches libtorch's settings and memory where tch does not.

#include <cstdint>
#include <cstdlib>
#include <exception>

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

// An operation without a deterministic algorithm throws from here on. Must be called before CUDA is used: cuBLAS reads
// its workspace's setting once.
extern "C" void relora_use_deterministic_algorithms() {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Everything that is read has been written: filling new tensors would only cost time.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
}

// A flat tensor in page-locked memory of the host, for whoever calls to own; null where there is no such memory.
extern "C" at::Tensor* relora_page_locked(int64_t len, int8_t scalar_type) {
    try {
        const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type));
        return new at::Tensor(at::empty({len}, options.pinned_memory(true)));
    } catch (const std::exception&) {
        return nullptr;
    }
}
