"""Whether heads and neurons can be removed as a layout says: the small model is tried on a few tokens.

Shapes do not tell that an attention module pairs its heads or counts on their number. So the projections that the units
end in are compared: with units removed, they must put out what they do where the units are zero.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checks import InputError, fail
from ...measure.tokens import device_of, evaluating
from ...models.text_config import text_config
from .units import Units, kept_entries, masks_of

_LENGTH = 8


def outputs_of_zeros(model: PreTrainedModel, kept: Sequence[tuple[Units, Tensor]]) -> dict[str, Tensor]:
    """What each projection puts out where the units that go are zero, by its path; nothing for models without tokens.

    Args:
        model: dense, and left as it is.
        kept: heads and neurons, as `shrink` takes them.

    Raises:
        InputError: if the model does not run on ``input_ids``.
    """
    if not kept or model.main_input_name != "input_ids":
        return {}
    outputs: dict[str, Tensor] = {}

    def without(gone: Tensor, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].masked_fill(gone.to(args[0].device), 0), *args[1:])

    def note(path: str, _: Any, args: Any, output: Tensor) -> None:
        outputs[path] = output.clone()

    with ExitStack() as stack:
        for units, mask in kept:
            path, slot = units.output.module, units.output
            projection = model.get_submodule(path)
            gone = torch.ones(model.get_parameter(slot.parameter).shape[slot.dim], dtype=torch.bool)
            gone[kept_entries(slot, len(gone), units.sizes, masks_of(units, mask.cpu()))] = False
            stack.callback(projection.register_forward_pre_hook(partial(without, gone)).remove)
            stack.callback(projection.register_forward_hook(partial(note, path)).remove)
        try:
            _run(model)
        except Exception as error:  # whatever a forward raises
            raise fail("shrink", "model", "run on input_ids, to be tried", str(error).partition("\n")[0]) from error
    return outputs


def check_outputs(model: PreTrainedModel, expected: Mapping[str, Tensor]) -> None:
    """Refuse unless every projection puts out what is ``expected``; the next one then sees exactly that.

    Raises:
        InputError: also if the small model does not run.
    """
    constraint = "compute the same with its units removed as with zeros in their place"

    def compare(path: str, _: Any, args: Any, output: Tensor) -> Tensor:
        if not _close(output, expected[path]):
            raise fail("shrink", "model", constraint, f"{type(model).__name__}, where the output of {path} changes")
        return expected[path]

    with ExitStack() as stack:
        for path in expected:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(compare, path)).remove)
        try:
            _run(model)
        except InputError:
            raise
        except Exception as error:  # whatever a forward raises that counts on a size
            got = f"{type(model).__name__}, which then raises: {str(error).partition(chr(10))[0]}"
            raise fail("shrink", "model", constraint, got) from error


def _run(model: PreTrainedModel) -> None:
    vocabulary = int(text_config(model).vocab_size)
    ids = torch.randint(vocabulary, (1, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device_of(model))
    with evaluating(model):
        if model.config.is_encoder_decoder:
            model.base_model(input_ids=ids, decoder_input_ids=ids)
        else:
            model.base_model(input_ids=ids)


def _close(one: Tensor, other: Tensor) -> bool:
    """Up to the order of sums, by the largest value."""
    if one.shape != other.shape:
        return False
    scale = float(other.double().abs().nan_to_num(0, 0, 0).amax())
    tolerance = max(1e-3, 16 * torch.finfo(other.dtype).eps) * scale
    return torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance, equal_nan=True)
