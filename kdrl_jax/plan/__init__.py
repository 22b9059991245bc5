"""What a config's programs need of a TPU, read from the programs that XLA compiles for it.

`chips` and `topology` name the hardware, `hlo` reads a compiled program's text, `cost` adds up what it
computes and moves, and `model_flops` says what the model alone would have to compute.
"""
