"""Verifiers, and the worker processes they run in.

`answers` reads answers and numbers out of text, with `units` and `phrases` for the words around them;
`functions`, `choices` and `mathematics` turn them into scores, the last on `tidy`, `forms`, `expressions`,
`values` and `symbolic`. `votes` says what a completion votes for, in the `spelling` of its answer.
`worker` runs functions in a process of their own, `process` is one such process seen from outside, and
`pool.RewardPool` is what training uses.

Nothing here imports jax or numpy, and this file imports nothing, so that a worker starts fast.
"""
