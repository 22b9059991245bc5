"""Text in, token ids out: tokenizers, chat templates, question sources and the prompt pipeline."""
