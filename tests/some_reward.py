"""Verdicts that random completions differ in, so that reinforcement has something to go by."""

import os
import zlib


def variety(question, completion, answer):
    return float(len(set(completion)) % 2)


def noted(question, completion, answer):
    """Right for a third of the questions, wrong for another and as `variety` for the rest; the question is
    written down in the working directory, in a file of the process that asks."""
    with open(f"asked_{os.getppid()}.txt", "a") as file:
        file.write(f"{question}\n")
    return (0.0, 1.0, variety(question, completion, answer))[zlib.crc32(question.encode()) % 3]
