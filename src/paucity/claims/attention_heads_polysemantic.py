"""Claim: nearly all attention heads have several unrelated roles.

Paper: Kissane et al. 2024, https://arxiv.org/abs/2406.17759, section 4.2: of every head of GPT-2 small the authors read
the ten features that it has the largest share in, and found all of one kind in at most one head of ten. Here nobody
reads: the role of a feature in a head is where the head looks when the feature is strong, by the source token that
gives most to it: the token itself, the one before, one after an earlier occurrence of it, an earlier occurrence, the
first token, or another one near or far. The last two say little of a role, so that it is what is looked for there: a
keyword, a word, a number, white space, another sign. A role is that of at least half of a feature's strongest tokens;
without one, a feature counts for nothing. A head has several roles if at least two of its features have another role
than most. The share with what is looked for left out is given beside it, as is that of directions drawn at random.
"""

import keyword
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dictionary.head_attribution import head_weights, source_contributions
from ..dictionary.job import text_windows
from ..dictionary.live import Harvester
from ..dictionary.sae import SparseAutoencoder
from ..dictionary.sources import TensorSource
from ..dictionary.topk import TopK
from ..dictionary.trainer import train
from ..measure.data import held_out_python, read_text
from ..measure.stats import share_interval
from ..measure.tokens import evaluating
from ..models.harvest import harvest
from ..models.load import Loaded, load
from ..models.places import find_hook, num_heads
from . import CLAIMS
from .base import ClaimResult
from .dictionaries import LEARNING_RATE

NAME = "attention-heads-polysemantic"
FEATURES, EXAMPLES, NEAR, LENGTH, K = 10, 20, 8, 256, 16
BATCH_SIZE = 512
UNCLEAR = "unclear"
SHARE = 0.9
"""The paper's: at least 90 % of the heads."""


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Train a dictionary on the heads of each layer, and count the roles of each head's features.

    Args:
        quick: two layers, fewer tokens, one seed.
        seed: of the first dictionaries; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    count = int(loaded.model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    layers = list(range(count))[-2:] if quick else list(range(count))
    job = _Job(loaded, layers, quick)
    seeds = list(range(seed, seed + (1 if quick else 2)))
    found = [job.roles(layer, draw) for draw in seeds for layer in layers]
    several = [polysemantic(head) for each in found for head in each["features"]]
    places = [polysemantic(_where(head)) for each in found for head in each["features"]]
    control = [polysemantic(head) for each in found for head in each["random"]]
    share = share_interval([float(each) for each in several])
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"GPT-2 small, share of heads with several roles": SHARE},
        measured={
            "share of heads": share.value,
            "interval": [share.low, share.high],
            "share of heads, by where they look alone": sum(places) / len(places),
            "share of heads, random directions": sum(control) / len(control),
            "roles": {
                f"seed {draw}": {
                    f"layer {layer}": found[row * len(layers) + column]["features"]
                    for column, layer in enumerate(layers)
                }
                for row, draw in enumerate(seeds)
            },
            "fvu": [each["fvu"] for each in found],
        },
        holds=share.value >= SHARE,
        seconds=time.monotonic() - started,
        seed=seed,
        settings=job.settings | {"model": loaded.source, "layers": layers, "seeds": seeds},
    )


def polysemantic(roles: dict[str, int]) -> bool:
    """Whether at least two features have another role than most; those without a clear role count for nothing."""
    counts = sorted((count for name, count in roles.items() if name != UNCLEAR), reverse=True)
    return sum(counts[1:]) >= 2


def role(ids: list[int], words: list[str], token: int, source: int) -> str:
    """What the source token is to the token, in a text of tokens ``ids`` that read ``words``."""
    if source == token:
        return "itself"
    if source == 0:
        return "first"
    if source == token - 1:
        return "previous"
    if ids[source - 1] == ids[token]:
        return "induction"
    if ids[source] == ids[token]:
        return "duplicate"
    return f"{'near' if token - source <= NEAR else 'far'} {kind(words[source])}"


def kind(word: str) -> str:
    """What a token is, by its text."""
    bare = word.strip()
    if not bare:
        return "space"
    if keyword.iskeyword(bare):
        return "keyword"
    if any(sign.isdigit() for sign in bare):
        return "number"
    return "word" if any(sign.isalpha() for sign in bare) else "sign"


def clear(found: Counter[str]) -> str:
    """The role that at least half of a feature's tokens have."""
    name, count = found.most_common(1)[0]
    return name if 2 * count >= found.total() else UNCLEAR


def _where(roles: dict[str, int]) -> dict[str, int]:
    """The same without what is looked for."""
    found: Counter[str] = Counter()
    for name, count in roles.items():
        found[name.partition(" ")[0]] += count
    return dict(found)


class _Job:
    """Outputs of the heads for training, and texts with patterns and values for looking at."""

    def __init__(self, loaded: Loaded, layers: list[int], quick: bool) -> None:
        self.model, tokenizer = loaded.model, loaded.need_tokenizer(NAME)
        tokens, self.num_tokens, self.dict_size = (8_192, 32_768, 512) if quick else (65_536, 262_144, 1024)
        self.heads, self.special = (
            num_heads(self.model, find_hook(self.model, "heads.0")),
            tuple(tokenizer.all_special_ids),
        )
        items = text_windows(tokenizer, read_text("python", role="training"), LENGTH, max_tokens=tokens)
        hooks = [f"heads.{layer}" for layer in layers]
        harvester = Harvester(self.model, hooks, items, skip_ids=self.special)
        parts = [harvester.parts(item) for item in range(len(items))]
        self.rows = {
            layer: torch.cat([part[hook] for part in parts]) for layer, hook in zip(layers, hooks, strict=True)
        }
        held_out = text_windows(tokenizer, held_out_python(), LENGTH, max_tokens=2_048 if quick else 8_192)
        self.texts = [row.unsqueeze(0) for item in held_out for row in item]
        self.ids = [row[0].tolist() for row in self.texts]
        self.words = [[tokenizer.decode([token]) for token in ids] for ids in self.ids]
        self.seen = self._look(layers)
        self.settings = {
            "num_tokens": self.num_tokens,
            "text_tokens": sum(map(Tensor.numel, items)),
            "held_out_tokens": sum(map(Tensor.numel, self.texts)),
            "dict_size": self.dict_size,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "k": K,
            "features": FEATURES,
            "examples": EXAMPLES,
        }

    def roles(self, layer: int, seed: int) -> dict[str, Any]:
        """The roles of the features of each head of a layer, and those of random directions."""
        rows = self.rows[layer]
        width = rows.shape[1]
        sae = SparseAutoencoder(width, self.dict_size, TopK(K), silent_after=self.num_tokens // 8, seed=seed)
        trained = train(
            sae,
            TensorSource(rows, seed=seed),
            num_tokens=self.num_tokens,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
        )
        z, patterns, values = self.seen[layer]
        with torch.no_grad():
            strength = sae.encode(z).to_dense().T  # of few texts
            drawn = torch.randn(self.heads * FEATURES, width, generator=torch.Generator().manual_seed(seed))
            drawn = F.normalize(drawn, dim=1)
            random_strength = (z @ drawn.T).T
            special = torch.isin(torch.cat(self.texts).flatten(), torch.tensor(self.special))
            strength[:, special], random_strength[:, special] = 0, -torch.inf  # no dictionary has seen these tokens
        share = head_weights(sae.atoms, self.heads)
        share[(strength > 0).sum(1) < EXAMPLES] = -1  # too rare to say what they do
        features, controls = [], []
        for head in range(self.heads):
            best = [int(i) for i in share[:, head].topk(min(FEATURES, len(share))).indices if share[i, head] > 0]
            seen = [self._role(strength[i], sae.encoder[i].detach(), head, patterns, values) for i in best]
            features.append(dict(Counter(seen)))
            mine = range(head * FEATURES, (head + 1) * FEATURES)
            controls.append(
                dict(Counter(self._role(random_strength[i], drawn[i], head, patterns, values) for i in mine))
            )
        return {"features": features, "random": controls, "fvu": trained.history[-1].fvu[0]}

    def _look(self, layers: list[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Outputs ``[texts * T, width]``, patterns ``[texts, heads, T, T]`` and values ``[texts, T, groups, d]``."""
        outputs = {layer: find_hook(self.model, f"heads.{layer}") for layer in layers}
        values = {
            layer: find_hook(self.model, f"{hook.module.rpartition('.')[0]}.v_proj") for layer, hook in outputs.items()
        }
        found = [harvest(self.model, [*outputs.values(), *values.values()], ids) for ids in self.texts]
        config: Any = self.model.config
        before = config._attn_implementation
        self.model.set_attn_implementation("eager")  # type: ignore[operator]
        try:
            with evaluating(self.model):
                shown = [
                    self.model(input_ids=ids, use_cache=False, output_attentions=True).attentions for ids in self.texts
                ]
        finally:
            self.model.set_attn_implementation(before)  # type: ignore[operator]
        seen = {}
        for layer in layers:
            z = torch.cat([each[outputs[layer].name] for each in found]).float()
            v = torch.stack([each[values[layer].name] for each in found]).float()
            patterns = torch.stack([each[layer][0] for each in shown]).float()
            seen[layer] = z, patterns, v.view(*v.shape[:-1], -1, z.shape[1] // self.heads)
        return seen

    def _role(self, strength: Tensor, direction: Tensor, head: int, patterns: Tensor, values: Tensor) -> str:
        """The role of the strongest source over a feature's strongest tokens."""
        length = patterns.shape[-1]
        part = direction.view(self.heads, -1)[head]
        found: Counter[str] = Counter()
        for place in strength.topk(EXAMPLES).indices.tolist():
            text, token = divmod(place, length)
            group = head * values.shape[2] // self.heads
            given = source_contributions(patterns[text, head, token : token + 1], values[text, :, group], part)
            source = int(given[0, : token + 1].argmax())
            found[role(self.ids[text], self.words[text], token, source)] += 1
        return clear(found)
