// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/ as build.py has prepared them, or those of the one source that ONLY names; and emulator_begin,
// which a test calls before each kernel.

#ifdef ONLY
#include ONLY

extern "C" const char* minference_error(int error) { return cudaGetErrorString(error); }
#else
#include "attend.cu"
#include "attend_fp8.cu"
#include "probe.cu"
#endif

extern "C" void emulator_begin(int seed, int left_out) {
    emulator::generator.seed(seed);
    emulator::left_out = left_out;
    emulator::described.clear();
    emulator::failed = false;
    emulator::report[0] = 0;
}
