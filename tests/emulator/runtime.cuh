// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that the kernels' host code calls.
#pragma once

#include "program.cuh"

namespace emulator {

// The statement that a broken kernel is to skip, if any: see build.py.
inline int left_out = NONE;

}  // namespace emulator

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaErrorInvalidValue, cudaErrorEmulated };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
    return bytes > emulator::MAX_SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return emulator::failed ? cudaErrorEmulated : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorEmulated ? emulator::report : "invalid value";
}

inline cudaError_t cudaMemset2DAsync(void* target, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    for (size_t row = 0; row < height; ++row) memset(static_cast<char*>(target) + row * pitch, value, width);
    return cudaSuccess;
}
