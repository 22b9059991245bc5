"""Sampling completions on the device."""
