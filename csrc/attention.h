// Host functions that launch the attention kernels on a stream (a cudaStream_t). They don't check their
// arguments; CUDA errors are thrown as std::runtime_error.
#pragma once

#include "params.h"

// Computes out and lse.
void attention_forward_sm90(const AttentionParams& params, void* stream);

// Computes delta, then dq, dk and dv. If dq_sum is null, one CTA computes each row, so the result is
// deterministic. Otherwise (head_dim above 64 only) the kernel for dk and dv also accumulates dq in
// dq_sum, in no particular order, which takes fewer products.
void attention_backward_sm90(const AttentionParams& params, void* stream);

// The parts of the backward pass. The device must be current and next_item must be zero.
void attention_delta(const AttentionParams& params, void* stream);
void attention_dq_sm90(const AttentionParams& params, void* stream);
void attention_dkdv_sm90(const AttentionParams& params, void* stream);
void attention_dkdv_and_dq_sm90(const AttentionParams& params,
                                void* stream);  // adds dq / scale to dq_sum
