"""Runs kvpress in its own Python: reads a job as JSON from each line of stdin, writes the result as JSON to stdout.

Started as ``python -c SOURCE MODEL THREADS``; it needs torch, transformers and kvpress, and nothing of this
package. A job is a mapping with ``do``:

- ``press``: compress with ``name`` (of a class of kvpress, or null for none), ``options`` and, inside ``AdaKVPress``
  where ``heads`` is true, from now on;
- ``cases``: answer ``cases`` of ``prompt``, ``rest`` and ``num_scored``: gives ``outcomes`` of (right, bits);
- ``prefill``: read ``prompt``: gives ``seconds`` and ``bytes`` of the cache;
- ``decode``: ``num_tokens`` steps after the last ``prefill``: gives ``seconds``.
"""

import contextlib
import json
import math
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Peer:
    """A model, the press in force and the cache of the last prompt."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self.press: Any = None
        self.cache: Any = None
        self.seen = 0

    def set_press(self, job: dict[str, Any]) -> dict[str, Any]:
        """Make the press."""
        kvpress = __import__("kvpress")
        press = None if job["name"] is None else getattr(kvpress, job["name"])(**job["options"])
        self.press = kvpress.AdaKVPress(press) if press is not None and job["heads"] else press
        return {"version": getattr(kvpress, "__version__", "")}

    def read(self, prompt: list[int]) -> torch.Tensor:
        """Fill a new cache, compressed; logits of the last token."""
        self.cache, self.seen = DynamicCache(), len(prompt)
        with contextlib.nullcontext() if self.press is None else self.press(self.model):
            ids = torch.tensor([prompt])
            return self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits  # type: ignore[no-any-return]

    def go_on(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of further tokens; positions go on where the prompt stopped, whatever was dropped."""
        positions = torch.arange(self.seen, self.seen + ids.shape[1])[None]
        self.seen += ids.shape[1]
        return self.model(input_ids=ids, past_key_values=self.cache, position_ids=positions).logits  # type: ignore[no-any-return]

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Whether what follows each prompt is likeliest, and its bits."""
        outcomes = []
        for case in job["cases"]:
            last, rest = self.read(case["prompt"]), torch.tensor([case["rest"]])
            logits = torch.cat([last, self.go_on(rest[:, :-1])], dim=1) if rest.shape[1] > 1 else last
            logits, wanted = logits[0, -case["num_scored"] :].float(), rest[0, -case["num_scored"] :]
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            outcomes.append((bool((logits.argmax(-1) == wanted).all()), float(nats) / math.log(2)))
        return {"outcomes": outcomes}

    def prefill(self, job: dict[str, Any]) -> dict[str, Any]:
        """Time of a prompt, compression included, and what the cache then holds."""
        started = time.perf_counter()
        self.read(job["prompt"])
        seconds = time.perf_counter() - started
        held = sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))
        return {"seconds": seconds, "bytes": held}

    def decode(self, job: dict[str, Any]) -> dict[str, Any]:
        """Time of single steps."""
        token = torch.tensor([[5]])
        started = time.perf_counter()
        for _ in range(job["num_tokens"]):
            token = self.go_on(token)[:, -1:].argmax(-1)
        return {"seconds": time.perf_counter() - started}


def main() -> None:
    """Serve until stdin ends."""
    out, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(sys.argv[2]))
    peer = Peer(sys.argv[1])
    do = {"press": peer.set_press, "cases": peer.answer, "prefill": peer.prefill, "decode": peer.decode}
    for line in sys.stdin:
        job = json.loads(line)
        with torch.no_grad():
            print(json.dumps(do[job["do"]](job)), file=out, flush=True)


if __name__ == "__main__":
    main()
