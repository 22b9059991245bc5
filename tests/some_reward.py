"""A verdict that random completions differ in, so that reinforcement has something to go by."""


def variety(question, completion, answer):
    return float(len(set(completion)) % 2)
