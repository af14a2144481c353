// The kernels' host side, one function each: checks nothing, launches on the stream (a cudaStream_t),
// throws what CUDA says as std::runtime_error.
#pragma once

#include "params.h"

// Fills out and lse.
void attention_forward_sm90(const AttentionParams& params, void* stream);

// Fills delta, then dq, dk and dv. Without dq_sum every row has one author, and the bits are the same
// every time; with it (head_dim above 64) dq is added up there in passing, in no particular order: fewer
// products.
void attention_backward_sm90(const AttentionParams& params, void* stream);

// Its parts, which ask for the device to be current and next_item to be zeros.
void attention_delta(const AttentionParams& params, void* stream);
void attention_dq_sm90(const AttentionParams& params, void* stream);
void attention_dkdv_sm90(const AttentionParams& params, void* stream);
void attention_dkdv_and_dq_sm90(const AttentionParams& params,
                                void* stream);  // adds dq / scale to dq_sum
