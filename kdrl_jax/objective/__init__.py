"""The mathematics: arrays in, arrays out. No model, no config, no flax."""
