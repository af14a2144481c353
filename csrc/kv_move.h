// The host function of the compact cache's loader. It does not check its arguments; errors of CUDA are
// thrown as std::runtime_error.
#pragma once

#include "params.h"

// Makes a move on the stream, a cudaStream_t, in one launch for any number of layers, entries and
// tokens.
void kv_move(const KvMoveParams& params, void* stream);
