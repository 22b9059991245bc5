"""Verifiers, and the worker processes they run in.

`answers` reads answers and numbers out of text, `functions` turns them into scores, `worker` runs functions
in a process of their own, `process` is one such process seen from outside, and `pool.RewardPool` is what
training uses. Nothing here imports jax or numpy, and this file imports nothing, so that a worker starts fast.
"""
