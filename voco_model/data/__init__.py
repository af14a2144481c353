"""Instruction data for training: records, samples, token ids and labels, batches."""
