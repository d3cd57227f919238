"""Runs a plan: scheduler, KV cache, executor, sampler and the loop that joins them."""
