// The kernels' host side, one function each: checks nothing, launches on the stream, throws what CUDA says.
#pragma once

#include "params.h"
#include "runtime.cuh"

// Fills out and lse.
void attention_forward_sm90(const AttentionParams& params, runtime::Stream stream);

// Fills delta, then dq, dk and dv. No atomics: the same bits every time.
void attention_backward_sm90(const AttentionParams& params, runtime::Stream stream);

// Its parts, which ask for the device to be current.
void attention_delta(const AttentionParams& params, runtime::Stream stream);
void attention_dq_sm90(const AttentionParams& params, runtime::Stream stream);
void attention_dkdv_sm90(const AttentionParams& params, runtime::Stream stream);
