"""The lab: the paper's comparison in miniature, from protocol.yaml and configs/lab to results/lab.

python -m benchmarks.lab runs what is missing, on as many cores as there are, and writes the tables; see
docs/lab.md.
"""
