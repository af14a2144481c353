// The host side of the compact cache's loader: checks nothing, launches on the stream (a cudaStream_t),
// throws what CUDA says as std::runtime_error.
#pragma once

#include "params.h"

// One launch, whatever the number of layers, entries and tokens.
void kv_move(const KvMoveParams& params, void* stream);
