"""What the embedded model is trained on: Python source, prose, and recall tasks built over both.

A training sequence is a list of token ids and of loss weights. Tokens that nobody could predict (the random digits of
a hidden number) weigh nothing, and the answers weigh more, so that a short training run learns to retrieve.
"""

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ...measure.prompts import Fact, interleave, key_value, multi_value, passkey, scatter, variable_tracking

END = "<|endoftext|>"
ANSWER_WEIGHT = 3.0


@dataclass
class Corpus:
    """Token streams by kind, each one document after another, separated by the end token (id 0)."""

    code: np.ndarray
    prose: np.ndarray
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.line_ends = line_end_ids(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def window(self, kind: str, length: int, rng: random.Random) -> list[int]:
        """``length`` consecutive tokens from a random place."""
        stream = self.code if kind == "code" else self.prose
        start = rng.randrange(len(stream) - length)
        window: list[int] = stream[start : start + length].tolist()
        return window


def line_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that are nothing but line feeds."""
    return frozenset(i for token, i in tokenizer.get_vocab().items() if set(token) == {"Ċ"})


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Token ids of all documents, each preceded by the end token, as uint16 ``[num_tokens]``."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.append(0)
        ids += encoding.ids
    return np.array(ids, dtype=np.uint16)


def _random_fact(rng: random.Random, length: int) -> Fact:
    task = rng.random()
    if task < 0.2:
        return passkey(rng)
    if task < 0.65:
        return key_value(rng, num_keys=rng.randint(2, max(2, min(48, length // 48))))
    if task < 0.8:
        return multi_value(rng, num_values=rng.randint(2, 4), num_keys=rng.randint(1, 4))
    return variable_tracking(rng, num_hops=rng.randint(1, 3), num_chains=rng.randint(1, 3))


def recall_sequence(corpus: Corpus, length: int, rng: random.Random) -> tuple[list[int], list[float]]:
    """Facts hidden in real text, then questions about them with their answers.

    Returns:
        (token ids, loss weights), each at most ``length`` long.
    """
    fact = _random_fact(rng, length)
    questions = [(fact.question, ", ".join(fact.answers))]
    for line in rng.sample(fact.distractors, min(len(fact.distractors), 7)):
        if line.startswith("The magic number for "):  # every pair of a key-value task can be asked for
            key, number = line.removeprefix("The magic number for ").removesuffix(".\n").split(" is ")
            questions.append((f"What is the magic number for {key}? The magic number for {key} is", number))
    rng.shuffle(questions)
    tail = corpus.encode("\n")
    tail_weights = [0.0] * len(tail)
    for question, answer in questions[: max(1, length // 96)]:
        q, a = corpus.encode(question), corpus.encode(f" {answer}.\n")
        tail += q + a
        tail_weights += [0.2] * len(q) + [ANSWER_WEIGHT] * len(a)
    lines = [corpus.encode(line) for line in interleave(fact, rng)]
    room = length - 1 - len(tail) - sum(map(len, lines))
    if room < 16:  # the facts alone fill a short sequence
        return recall_sequence(corpus, length, rng)
    kind = "code" if rng.random() < 0.5 else "prose"
    # Shorter haystacks now and then, so that retrieval is learned at every distance.
    room = room if rng.random() < 0.6 else rng.randint(16, room)
    body = scatter(corpus.window(kind, room, rng), lines, rng, line_ends=corpus.line_ends)
    ids = [0, *body, *tail]
    return ids, [0.4] * (1 + len(body)) + tail_weights


def copy_sequence(corpus: Corpus, length: int, rng: random.Random) -> tuple[list[int], list[float]]:
    """Random token strings that come again later: what makes copying heads appear early in training."""
    size = rng.randint(8, max(8, length // 8))
    piece = [rng.randrange(1, corpus.tokenizer.get_vocab_size()) for _ in range(size)]
    gap = corpus.window("code", rng.randint(8, length - 2 * size - 2), rng)
    ids = [0, *piece, *gap, *piece]
    return ids, [0.0] * (1 + size) + [0.4] * len(gap) + [0.3] * 4 + [1.0] * (size - 4)


def sequence(
    corpus: Corpus, length: int, rng: random.Random, *, recall_share: float, code_share: float = 0.7
) -> tuple[list[int], list[float]]:
    """One training sequence of exactly ``length`` tokens: recall or copy tasks packed together, or plain text."""
    if rng.random() >= recall_share:
        kind = "code" if rng.random() < code_share else "prose"
        return [0, *corpus.window(kind, length - 1, rng)], [1.0] * length
    ids: list[int] = []
    weights: list[float] = []
    while (left := length - len(ids)) >= 160:
        make = copy_sequence if rng.random() < 0.15 and left <= 1024 else recall_sequence
        new, new_weights = make(corpus, left, rng)
        ids, weights = ids + new, weights + new_weights
    return ids + corpus.window("code", left, rng), weights + [1.0] * left
