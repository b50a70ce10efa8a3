"""Benchmarks: what adapting a model costs, in time to trace and in FLOPs."""
