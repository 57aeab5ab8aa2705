"""Activations on disk: shards in safetensors beside ``activations.json``, written once and read shuffled.

A shard holds whole items, all hooks of one forward each: a tensor ``[rows, width]`` by the name of a hook, and for
texts ``tokens/ids`` and ``tokens/places`` (in the item, flat), so that a row leads back to its context. The folder
appears when it is complete; a job that was killed, be it in the middle of a shard, goes on with the shard that was not
whole, and the result is the same to the byte.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_choice, check_int, fail
from ..folder import Folder, replacing, write_whole
from ..models.harvest import Inputs, kept_tokens
from .live import Harvester
from .mixing import MixedSource

FILE = "activations.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Tell = Callable[[int, int, str], object]


class Shard(BaseModel):
    """One file: its first item, and the rows of each of its items."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    first: int
    counts: tuple[int, ...]


class Facts(BaseModel):
    """What ``activations.json`` says.

    Attributes:
        model: source of the model.
        hooks: width of each hook, in the order of a row.
        dtype: of the tensors.
        texts: what was run, in words.
        digest: of what was run.
        weights: digest of the model's.
        skip_ids: token ids that were left out.
        num_rows: activations in all.
        shard_rows: a shard ends with the item that makes it so long.
        shards: the files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = 1
    model: str
    hooks: dict[str, int]
    dtype: str
    texts: str
    digest: str
    weights: str
    skip_ids: tuple[int, ...]
    num_rows: int
    shard_rows: int
    shards: tuple[Shard, ...] = ()


def write_cache(
    folder: str | Path,
    harvester: Harvester,
    *,
    model: str,
    texts: str,
    dtype: str = "bfloat16",
    shard_rows: int = 65_536,
    force: bool = False,
    resume: bool = False,
    on_progress: Tell | None = None,
) -> Facts:
    """Write the activations of all items of ``harvester``.

    Args:
        folder: appears when all is written; until then there is ``FOLDER.partial``.
        harvester: model, hooks and items.
        model: where the model comes from.
        texts: what the items are, in words.
        dtype: ``bfloat16`` or ``float32``.
        shard_rows: a shard ends with the item that makes it so long.
        force: replace ``folder``; discard what is unfinished.
        resume: go on with what is unfinished; a complete ``folder`` of the same plan is left as it is.
        on_progress: told rows that are written, rows in all, and the file.

    Raises:
        InputError: if ``folder`` may not be written, what is to go on is of another plan (model, weights, items,
            hooks, dtype, length of shards), or an activation is not finite.
    """
    check_choice("write_cache", "dtype", dtype, DTYPES)
    check_int("write_cache", "shard_rows", shard_rows)
    plan = Facts(
        model=model,
        hooks={hook.name: width for hook, width in zip(harvester.hooks, harvester.widths, strict=True)},
        dtype=dtype,
        texts=texts,
        digest=_digest(harvester.items),
        weights=_digest_of_weights(harvester.model),
        skip_ids=tuple(sorted(harvester.skip_ids)),
        num_rows=sum(harvester.counts),
        shard_rows=shard_rows,
    )
    if resume and not force and (Path(folder) / FILE).is_file():
        found = read_facts(folder)
        if found.model_copy(update={"shards": ()}).model_dump_json() != plan.model_dump_json():
            raise fail("write_cache", "resume", "continue a run of the same plan", f"another in {folder}")
        return found
    work, shards, done = Folder(Path(folder), "write_cache"), list[Shard](), 0
    work.check(plan, force=force, resume=resume)
    work.open(plan, resume=resume)
    for first, stop in _cuts(harvester.counts, shard_rows):
        shard = Shard(file=f"shard-{len(shards):05d}.safetensors", first=first, counts=harvester.counts[first:stop])
        name = shard.file.removesuffix(".safetensors")
        if not work.has(name) or _fault(work.partial, shard, plan.hooks):
            _write_shard(work.partial / shard.file, harvester, range(first, stop), DTYPES[dtype])
            work.keep(name, shard.model_dump())
        shards.append(shard)
        done += sum(shard.counts)
        if on_progress is not None:
            on_progress(done, plan.num_rows, shard.file)
    facts = plan.model_copy(update={"shards": tuple(shards)})
    for left in work.partial.glob("*.tmp"):  # of a job that was killed
        left.unlink()
    write_whole(work.partial / FILE, facts.model_dump_json(indent=2) + "\n")
    work.publish()
    return facts


def read_facts(folder: str | Path) -> Facts:
    """What a cache holds.

    Raises:
        InputError: if it is none, or a shard is absent or not whole.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise fail("cached_source", "folder", f"hold activations ({FILE})", folder)
    try:
        facts = Facts.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise fail("cached_source", FILE, "be what paucity wrote", path) from None
    for shard in facts.shards:
        fault = _fault(path.parent, shard, facts.hooks)
        if fault:
            raise fail("cached_source", "shards", f"be there and whole, and fit {FILE}", f"{shard.file} ({fault})")
    return facts


def cached_source(
    folder: str | Path, hooks: str | Sequence[str] | None = None, *, capacity: int = 65_536, seed: int = 0
) -> MixedSource:
    """The activations of a cache, shuffled: items in an order of the seed, their rows mixed in a buffer.

    Args:
        folder: that `write_cache` wrote.
        hooks: which of its hooks, side by side in a row; None is all.
        capacity: rows of the buffer.
        seed: of the order.

    Raises:
        InputError: if the folder holds no whole cache, or a hook is not in it.
    """
    folder, facts = Path(folder), read_facts(folder)
    names = list(facts.hooks) if hooks is None else [hooks] if isinstance(hooks, str) else list(hooks)
    for name in names:
        check_choice("cached_source", "hooks", name, facts.hooks)
    places = [
        (shard.file, sum(shard.counts[:number]), count)
        for shard in facts.shards
        for number, count in enumerate(shard.counts)
    ]
    # Memory maps, for as long as the source lives: the folder may be written anew meanwhile.
    files: dict[str, Any] = {shard.file: safe_open(folder / shard.file, "pt") for shard in facts.shards}

    def read(item: int) -> Tensor:
        file, start, count = places[item]
        return torch.cat([files[file].get_slice(name)[start : start + count] for name in names], 1)

    width = sum(facts.hooks[name] for name in names)
    return MixedSource(read, [count for *_, count in places], width, capacity=capacity, seed=seed)


def _cuts(counts: Sequence[int], shard_rows: int) -> list[tuple[int, int]]:
    """Where shards begin and end, in items."""
    cuts, first, rows = [], 0, 0
    for number, count in enumerate(counts, 1):
        rows += count
        if rows >= shard_rows or number == len(counts):
            cuts.append((first, number))
            first, rows = number, 0
    return cuts


def _fault(folder: Path, shard: Shard, hooks: Mapping[str, int]) -> str:
    """What is wrong with a shard's file, by its header and its size; nothing if it is whole."""
    try:
        with safe_open(folder / shard.file, "pt") as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in hooks]
    except (OSError, SafetensorError) as error:
        return str(error)
    return "" if shapes == [(sum(shard.counts), width) for width in hooks.values()] else f"shapes {shapes}"


def _write_shard(path: Path, harvester: Harvester, items: range, dtype: torch.dtype) -> None:
    parts: dict[str, list[Tensor]] = {}
    for item in items:
        for name, rows in harvester.parts(item).items():
            if not bool(rows.isfinite().all()):
                raise fail("write_cache", "activations", "be finite", f"NaN or infinity in item {item} at {name}")
            parts.setdefault(name, []).append(rows.to(device="cpu", dtype=dtype))
        inputs = harvester.tokens(item)
        kept = kept_tokens(inputs, harvester.skip_ids)
        if kept is not None:
            ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
            parts.setdefault("tokens/ids", []).append(ids[kept].int().cpu())
            parts.setdefault("tokens/places", []).append(kept.flatten().nonzero()[:, 0].int().cpu())
    with replacing(path) as temporary:
        save_file({name: torch.cat(each).contiguous() for name, each in parts.items()}, temporary)


def _digest(items: Sequence[Inputs]) -> str:
    total = hashlib.sha256()
    for item in items:
        for name, x in [("", item)] if isinstance(item, Tensor) else sorted(item.items()):
            if not isinstance(x, Tensor):
                total.update(json.dumps([name, repr(x)]).encode())
                continue
            total.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
            total.update(_bytes(x).cpu().numpy().tobytes())
    return total.hexdigest()


def _digest_of_weights(model: nn.Module) -> str:
    """Of every tensor its name, shape and sum of bytes, and a sample of its bytes."""
    total = hashlib.sha256()
    for name, x in model.state_dict().items():
        if isinstance(x, Tensor):
            held = _bytes(x)
            total.update(json.dumps([name, str(x.dtype), list(x.shape), int(held.sum())]).encode())
            total.update(held[:: len(held) // 4096 | 1].cpu().numpy().tobytes())
    return total.hexdigest()


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)
