"""A deterministic simulator: the package's own control plane, memory and commit code on a virtual clock and network.

In the manner of FoundationDB: everything that can happen differently is drawn from one seed, so that a schedule of
faults that breaks a promise can be replayed step by step (``make simulate SIMULATE_ARGS="--seed 1234"``).
"""
