// What reaches libtorch's settings, products and memory where tch does not.

#include <cstdint>
#include <cstdlib>
#include <exception>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// An operation without a deterministic algorithm throws from here on. Must be called before CUDA is used: cuBLAS reads
// its workspace's setting once.
extern "C" void relora_use_deterministic_algorithms() {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Everything that is read has been written: filling new tensors would only cost time.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
}

// result = beta · result + alpha · left right, by oneDNN. libtorch exports it for itself, and its headers leave it out:
// with a libtorch without it nothing can be linked.
namespace at::native {
void mkldnn_matmul(const Tensor& left, const Tensor& right, const Tensor& result, float beta, float alpha);
}

// out = left right, or += with `adds`. Returns whether it was done; else `out` is as it was, and libtorch's own product
// will say what is wrong.
extern "C" int relora_onednn_multiply(const at::Tensor* left, const at::Tensor* right, const at::Tensor* out,
                                      int adds) {
    if (!at::globalContext().hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) return false;
    try {
        at::native::mkldnn_matmul(*left, *right, *out, adds ? 1.0f : 0.0f, 1.0f);
        return true;
    } catch (const std::exception&) {
        return false;
    }
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

// What follows is about the streams and the memory of a GPU, and may be called only where libtorch has one: it reaches
// its CUDA half through what all kinds of devices have in common, so nothing here is linked with that half.

static c10::Device cuda(int8_t gpu) { return {c10::kCUDA, gpu}; }

static const c10::impl::DeviceGuardImplInterface& streams() { return *c10::impl::getDeviceGuardImpl(c10::kCUDA); }

// The CUstream of this thread.
extern "C" void* relora_stream(int8_t gpu) noexcept {
    return streams().getStreamNativeHandle(streams().getStream(cuda(gpu)));
}

// A stream beside the usual one, by libtorch's number.
extern "C" int64_t relora_side_stream(int8_t gpu) noexcept {
    return streams().getStreamFromGlobalPool(cuda(gpu)).id();
}

// Has the work of this thread go on another stream, and returns the number of the one before.
extern "C" int64_t relora_exchange_stream(int8_t gpu, int64_t stream) noexcept {
    return streams().exchangeStream(c10::Stream(c10::Stream::UNSAFE, cuda(gpu), stream)).id();
}

// How often memory was asked for so far.
extern "C" int64_t relora_num_allocations(int8_t gpu) noexcept {
    return c10::getDeviceAllocator(c10::kCUDA)->getDeviceStats(gpu).allocation[0].allocated;
}
