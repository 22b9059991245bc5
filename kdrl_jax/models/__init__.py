"""One decoder for all families, and the tables that read published checkpoints into it."""
