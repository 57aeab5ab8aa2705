"""Retrieval-from-context prompts with a known answer, in the style of RULER.

Paper: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654 (needle tasks and variable tracking); the passkey prompt is
that of Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300; threads are those of Roberts et al. 2024,
https://arxiv.org/abs/2411.05000, as sentences instead of a JSON object of random identifiers, one thread asked for at a
time. The haystack is real text given by the caller.
"""

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..checks import check_choice, check_int

_words = str.split
_ADJECTIVES = _words(
    "amber ancient bitter bold brave bright broken calm clever cold crisp curious dark deep distant dry dusty "
    "early empty faint fair fierce final gentle golden grand green grey heavy hidden hollow humble idle iron "
    "jolly keen late little lonely long loud mellow narrow noble old pale patient plain proud quick quiet rapid "
    "rare red rough round royal rusty sharp silent silver simple slow small smooth soft solid steady stern still "
    "strange strong sudden sweet tall tender thick thin tiny vast warm white wide wild wise young"
)
_NOUNS = _words(
    "anchor apple arrow badger basket beacon bell bird boat bottle bridge candle canyon castle cloud coast copper "
    "corner cousin cradle desert dragon eagle engine falcon farmer feather field finger flame forest fountain "
    "garden gate glacier hammer harbor hawk helmet horse hunter island jacket journey kettle key king kitchen "
    "ladder lantern leaf lemon letter lion lizard market meadow mirror moon mountain needle ocean orchard otter "
    "paper pepper pilot planet pocket prince queen rabbit raven river road rocket sailor saddle shadow shepherd "
    "ship spider spoon stone storm summer table temple thunder tiger tower valley village violin wagon water "
    "whale window winter wolf"
)


@dataclass(frozen=True)
class Fact:
    """Needles to hide in a text, a question about them and the answers expected, in the order of appearance.

    A ``verbatim`` answer is graded by the share of its tokens that are right, instead of as a whole.
    """

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    verbatim: bool = False


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10_000, 100_000), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), count)
    return [f"{_ADJECTIVES[p // len(_NOUNS)]} {_NOUNS[p % len(_NOUNS)]}" for p in pairs]


def passkey(rng: random.Random) -> Fact:
    """One number hidden in the text."""
    number = _number(rng)
    needle = f"The pass key is {number}. Remember it. {number} is the pass key.\n"
    return Fact((needle,), "What is the pass key? The pass key is", (number,))


def key_value(rng: random.Random, *, num_keys: int = 16) -> Fact:
    """RULER's multi-key needle: ``num_keys`` pairs of key and number, one of which is asked for."""
    keys, numbers = _keys(rng, num_keys), _numbers(rng, num_keys)
    lines = [f"The magic number for {key} is {number}.\n" for key, number in zip(keys, numbers, strict=True)]
    question = f"What is the magic number for {keys[0]}? The magic number for {keys[0]} is"
    return Fact((lines[0],), question, (numbers[0],), tuple(lines[1:]))


def multi_value(rng: random.Random, *, num_values: int = 3, num_keys: int = 4) -> Fact:
    """RULER's multi-value needle: one key with several numbers, all asked for, among other keys."""
    keys, numbers = _keys(rng, num_keys), _numbers(rng, num_values + num_keys - 1)
    needles = tuple(f"One magic number for {keys[0]} is {number}.\n" for number in numbers[:num_values])
    pairs = zip(keys[1:], numbers[num_values:], strict=True)
    others = tuple(f"One magic number for {key} is {number}.\n" for key, number in pairs)
    question = f"What are all {num_values} magic numbers for {keys[0]}? The magic numbers for {keys[0]} are"
    return Fact(needles, question, tuple(numbers[:num_values]), others)


def variable_tracking(rng: random.Random, *, num_hops: int = 2, num_chains: int = 2) -> Fact:
    """RULER's variable tracking: chains ``VAR b = VAR a``; which variables hold the first chain's number is asked."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < num_chains * (num_hops + 1):
        name = "".join(rng.choices(letters, k=5))
        if name not in names:
            names.append(name)
    numbers = _numbers(rng, num_chains)
    chains = []
    for c in range(num_chains):
        chain = names[c * (num_hops + 1) : (c + 1) * (num_hops + 1)]
        links = [f"VAR {b} = VAR {a}\n" for a, b in pairwise(chain)]
        chains.append((f"VAR {chain[0]} = {numbers[c]}\n", *links))
    others = tuple(line for chain in chains[1:] for line in chain)
    question = f"Which {num_hops + 1} variables hold {numbers[0]}? The variables are"
    return Fact(chains[0], question, tuple(names[: num_hops + 1]), others)


def threading(rng: random.Random, *, num_steps: int = 3, num_threads: int = 3, direction: str = "forward") -> Fact:
    """Needle threading: the value of a key is the next key, and the value at the end of the first thread is asked for.

    Args:
        rng: of keys and numbers.
        num_steps: lines of a thread; 1 is `key_value`.
        num_threads: threads of that length, all but one of them distractors.
        direction: in which order the lines of the thread stand in the text: one of `DIRECTIONS`.
    """
    check_int("threading", "num_steps", num_steps)
    check_int("threading", "num_threads", num_threads)
    check_choice("threading", "direction", direction, DIRECTIONS)
    starts, numbers = _keys(rng, num_threads), _numbers(rng, num_threads * num_steps)
    threads = []
    for t, start in enumerate(starts):
        thread = [start, *numbers[t * num_steps : (t + 1) * num_steps]]
        lines = [f"The magic number for {key} is {value}.\n" for key, value in pairwise(thread)]
        if direction == "random":
            rng.shuffle(lines)
        threads.append(lines[::-1] if direction == "backward" else lines)
    question = (
        f"What is the last of the {num_steps} magic numbers on the thread from {starts[0]}? "
        f"The last magic number from {starts[0]} is"
    )
    others = tuple(line for lines in threads[1:] for line in lines)
    return Fact(tuple(threads[0]), question, (numbers[num_steps - 1],), others)


def copying(rng: random.Random, *, num_words: int = 16) -> Fact:
    """A list of words that is to be repeated word for word."""
    check_int("copying", "num_words", num_words)
    words = " ".join(rng.choices(_ADJECTIVES + _NOUNS, k=num_words))
    return Fact((f"The words are {words}.\n",), "What are the words? The words are", (words,), verbatim=True)


DIRECTIONS = ("forward", "backward", "random")

TASKS: dict[str, Callable[[random.Random], Fact]] = {
    "passkey": passkey,
    "key_value": key_value,
    "multi_value": multi_value,
    "threading": threading,
    "variable_tracking": variable_tracking,
    "copying": copying,
}


def scatter(
    filler: Sequence[int], lines: Sequence[Sequence[int]], rng: random.Random, *, line_ends: Container[int] = ()
) -> list[int]:
    """Token ids of ``filler`` with ``lines`` inserted at random depths, in their order, at line ends if there are any.

    Args:
        filler: token ids of the haystack.
        lines: token ids of each needle.
        rng: of the depths.
        line_ends: ids of the tokens that end a line; where there are too few of them, a line goes anywhere.
    """
    ends = [0, *(i + 1 for i, token in enumerate(filler) if token in line_ends)]
    places = ends if len(ends) > len(lines) else range(len(filler) + 1)
    depths = sorted(rng.choice(places) for _ in lines)
    out: list[int] = []
    last = 0
    for depth, line in zip(depths, lines, strict=True):
        out += filler[last:depth]
        out += line
        last = depth
    return out + list(filler[last:])


def interleave(fact: Fact, rng: random.Random) -> list[str]:
    """Needles and distractors shuffled together, the needles kept in their own order."""
    slots = [True] * len(fact.needles) + [False] * len(fact.distractors)
    rng.shuffle(slots)
    needles, others = iter(fact.needles), iter(rng.sample(fact.distractors, len(fact.distractors)))
    return [next(needles) if slot else next(others) for slot in slots]
