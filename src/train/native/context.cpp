// What reaches libtorch's global settings, which tch does not bind.

#include <cstdlib>

#include <ATen/Context.h>

// An operation without a deterministic algorithm throws from here on. Must be called before CUDA is used: cuBLAS reads
// its workspace's setting once.
extern "C" void relora_use_deterministic_algorithms() {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Everything that is read has been written: filling new tensors would only cost time.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
}
