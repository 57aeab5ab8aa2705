"""Rotary position embedding, as far as policies need it: to give queries and keys other positions afterwards.

Paper: Su et al. 2021 (RoFormer), https://arxiv.org/abs/2104.09864, Sec. 3.2: a pair of dimensions is turned by
``position * inv_freq``. Turns add up, so that what was turned to one position is brought to another by the difference.

`find_rotary` recognises half-split layouts (dimension ``i`` with ``i + R / 2``, as in Llama, Qwen, Mistral, Gemma, Phi,
GPT-NeoX), whole or partial, with frequencies per kind of layer, and layers without positions. It finds nothing where
pairs are neighbours (GPT-J, Cohere, GLM), where the turned dimensions are not the first (multi-head latent attention),
where frequencies change with the length of the text (dynamic NTK, LongRoPE), or where several sets could be meant.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.text_config import text_config


@dataclass(frozen=True)
class Rotary:
    """How a layer turned its queries and keys.

    Attributes:
        inv_freq: ``[R / 2]`` float32, radians per position; the first ``R`` dimensions of a head are turned, dimension
            ``i`` together with ``i + R / 2``.
    """

    inv_freq: Tensor

    def turn(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """``x`` as it would be at other positions.

        Args:
            x: ``[..., T, D]`` float, at positions ``old``.
            old: ``[T]`` int64.
            new: ``[T]`` int64.

        Returns:
            ``[..., T, D]`` in the dtype of ``x``; a scale on the embedding (YaRN) stays.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        freq, half = self.inv_freq.to(x.device), len(self.inv_freq)
        # The model rounded its angles to float32; what it rounded is undone, so that the result is as if it were new.
        angle = (new[:, None].float() * freq).double() - (old[:, None].float() * freq).double()
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        left, right, rest = (part.to(wide) for part in torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1))
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1).to(x.dtype)


def find_rotary(model: nn.Module, layer: int) -> Rotary | None:
    """How ``layer`` of a Hugging Face model turns positions; None where it has no rotary embedding of a kind known."""
    path, module = _attention_at(model, layer)
    if module is None or not _half_split(module) or (turns := _turns(module)) is None:
        return None
    config = text_config(model)
    if getattr(config, "qk_rope_head_dim", None):
        return None
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds is not None and layer < len(kinds) else None
    found = next((sets for owner in _owners(model, path) if (sets := _frequencies(owner, kind))), [])
    if not found or any(static is False or not torch.equal(freq, found[0][0]) for freq, static in found):
        return None
    freq = found[0][0].float()
    dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if isinstance(dim, int) and 2 * len(freq) > dim:
        return None
    return Rotary(freq if turns else torch.zeros_like(freq))


def _attention_at(model: nn.Module, layer: int) -> tuple[str, nn.Module | None]:
    """Name and module of a layer's causal attention."""
    for name, module in model.named_modules():
        if getattr(module, "layer_idx", None) == layer and getattr(module, "is_causal", None) is True:
            return name, module
    return "", None


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at ``path`` and those that it is in, from the inside out."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:end]))


def _frequencies(owner: nn.Module, kind: str | None) -> list[tuple[Tensor, bool]]:
    """Every set of frequencies in ``owner`` for layers of a kind, and whether it is the same for all lengths."""
    found = []
    for module in owner.modules():
        for name, key in (("inv_freq", None), (f"{kind}_inv_freq", kind)):
            freq, rope_type = getattr(module, name, None), getattr(module, "rope_type", "default")
            if isinstance(freq, Tensor):
                rope_type = rope_type.get(key, "default") if isinstance(rope_type, dict) else rope_type
                found.append((freq, "dynamic" not in str(rope_type) and rope_type != "longrope"))
    return found


def _half_split(attention: nn.Module) -> bool:
    """Whether the function that turns queries in the model's own file turns ``i`` with ``i + R / 2``."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        return False
    x, angle = torch.linspace(-1, 1, 8).view(1, 1, 1, 8), torch.linspace(0.5, 2, 4).view(1, 1, 4)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
    try:
        turned = turn(x, x, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError, IndexError):  # it wants other arguments, or other shapes
        return False
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = Rotary(angle.flatten()).turn(x, zero, zero + 1)
    return turned.shape == x.shape and torch.allclose(turned, wanted, atol=1e-5)


def _turns(attention: nn.Module) -> bool | None:
    """Whether a layer turns its queries; None where its code decides that in a way that is not known."""
    use = getattr(attention, "use_rope", None)
    if use is not None:
        return bool(use)
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(type(attention).forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    choices = [node for node in ast.walk(code) if isinstance(node, ast.If)]
    named = [node for choice in choices for node in ast.walk(choice) if isinstance(node, ast.Name)]
    return None if any(name.id == "apply_rotary_pos_emb" for name in named) else True
