// The host function of the compact cache's loader. It doesn't check its arguments; CUDA errors are
// thrown as std::runtime_error.
#pragma once

#include "params.h"

// Transfers keys and values on a stream (a cudaStream_t), in one launch for any number of layers,
// entries and tokens.
void kv_move(const KvMoveParams& params, void* stream);
