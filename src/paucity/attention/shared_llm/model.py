"""SharedLLM: a short-context model reads its own compressed past, injected into its first layers.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 3: a lower model, the first ``M`` layers of a language
model, compresses chunks of the past context into trees of keys and values (`tree`, `lower`); the upper model, the whole
of it, reads them by cross-attention in its first ``M`` layers (`inject`) and predicts the running text.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...checks import check_ndim, check_shape, fail
from ...folder import replacing, write_whole
from ...measure.tokens import Progress, device_of
from .inject import Memory, TreeCrossAttention, injected
from .lower import LowerModel, compress
from .options import SharedOptions, rotary_of
from .train import SharedTraining, train

WEIGHTS, OPTIONS = "shared_llm.safetensors", "shared_llm.json"


class SharedLLM(nn.Module):
    """A causal language model that reads a context of any length through trees of compressed keys and values.

    The lower model's weights are those of the upper one's first layers, which the paper's training leaves as they are,
    so they are held once. The given model is copied, in float32 where it has less.

    Args:
        model: a Hugging Face causal language model laid out as Llama is (Llama, Mistral, Qwen2, Qwen3).
        options: sizes.

    Raises:
        InputError: if the model is laid out otherwise, has fewer layers, or no rotary embedding of a kind known.
    """

    def __init__(self, model: nn.Module, options: SharedOptions | None = None) -> None:
        super().__init__()
        self.options = options or SharedOptions()
        rotary = rotary_of(model, self.options.num_layers)
        self.upper: Any = copy.deepcopy(model)
        if self.upper.dtype in (torch.bfloat16, torch.float16):
            self.upper.float()
        generator = torch.Generator(device_of(self.upper)).manual_seed(self.options.seed)
        self.crosses = nn.ModuleList(
            TreeCrossAttention(layer, turn, self.options.start, generator)
            for layer, turn in zip(self.layers, rotary, strict=False)
        )
        self.train(model.training)

    @property
    def layers(self) -> list[Any]:
        """The upper model's decoder layers."""
        return list(self.upper.get_decoder().layers)

    def compress(self, context_ids: Tensor, query_ids: Tensor | None = None, *, noise: Sequence[float] = ()) -> Memory:
        """The trees of a context, made by the lower model without gradients.

        Args:
            context_ids: ``[B, T]`` int64, texts of equal length without padding. Chunks count from the end.
            query_ids: ``[B, Tq]`` int64: at every split the path goes to the half whose last token's state, after one
                layer of the lower model, is more like that of the query's last token after one layer of the upper one.
                None, which the paper has for language modelling, is always the right half.
            noise: as in `tree.level_lengths`, for training.

        Raises:
            InputError: if shapes do not fit, or context or query are empty.
        """
        check_ndim("compress", "context_ids", context_ids, 2)
        for name, ids in (("context_ids", context_ids), ("query_ids", query_ids)):
            if ids is not None:
                check_shape("compress", name, ids, len(context_ids), None)
                if not ids.numel():
                    raise fail("compress", name, "hold at least one token", f"shape {list(ids.shape)}")
        crosses: Any = self.crosses
        lower = LowerModel(self.upper.get_decoder(), [cross.rotary for cross in crosses], self.options.ratios)
        size, parallel = self.options.chunk_size, self.options.parallel_chunks
        with torch.no_grad():
            query = None if query_ids is None else lower.sketch(query_ids)
            return compress(lower, context_ids, query, chunk_size=size, parallel_chunks=parallel, noise=noise)

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor | Memory | None = None,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """What the upper model makes of the running text after a context.

        Args:
            input_ids: ``[B, T]`` int64, the running text.
            context: what `compress` made, or ``[B, Tc]`` int64 to compress as language modelling does; None is the
                upper model alone.
            attention_mask: of the running text; this and the rest are as transformers has them.
            past_key_values: cache of the running text.
            use_cache: whether a cache is wanted back.
            labels: of the running text.
            logits_to_keep: number of last positions whose logits are wanted; 0 is all.

        Raises:
            InputError: if the batch of the context is not that of the text.
        """
        check_ndim("forward", "input_ids", input_ids, 2)
        with self.reading(context, len(input_ids)):
            output: CausalLMOutputWithPast = self.upper(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                labels=labels,
                logits_to_keep=logits_to_keep,
            )
        return output

    def generate(
        self,
        input_ids: Tensor,
        context: Tensor | Memory | None = None,
        *,
        attention_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
    ) -> Tensor:
        """The running text continued by transformers' ``generate``, ``[B, T + new]`` or more rows, by ``config``.

        Everything else is as in `forward`; all new tokens become running text.
        """
        check_ndim("generate", "input_ids", input_ids, 2)
        with self.reading(context, len(input_ids)):
            ids: Tensor = self.upper.generate(input_ids, attention_mask=attention_mask, generation_config=config)
        return ids

    def reading(self, context: Tensor | Memory | None, batch: int) -> AbstractContextManager[None]:
        """Within it the upper model, in whatever way it is called with ``batch`` texts, reads ``context``."""
        if context is None:
            return nullcontext()
        memory = context if isinstance(context, Memory) else self.compress(context)
        if memory.keys[0].shape[0] != batch:
            raise fail("reading", "context", f"have {batch} texts", memory.keys[0].shape[0])
        if len(memory.keys) != len(self.crosses):
            raise fail("reading", "context", f"be compressed in {len(self.crosses)} layers", len(memory.keys))
        return injected(self.layers, list(self.crosses), memory)

    def fit(
        self, windows: Tensor, training: SharedTraining | None = None, on_progress: Progress | None = None
    ) -> list[float]:
        """Train the injection on ``windows [N, T]`` of token ids, see `train.train`; returns the loss of every step."""
        return train(self, windows, training or SharedTraining(), on_progress)

    def trained_parameters(self, *, top: bool = True) -> dict[str, nn.Parameter]:
        """What training changes: the cross-attention and, with ``top``, the self-attention of the layers above it."""
        kept = {id(weight) for weight in self.crosses.parameters()}
        for layer in self.layers[len(self.crosses) :] if top else ():
            kept |= {id(weight) for weight in layer.self_attn.parameters()}
        return {name: weight for name, weight in self.named_parameters() if id(weight) in kept}

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write ``shared_llm.safetensors``, all that training changes, and ``shared_llm.json``; the folder is made.

        Args:
            folder: new, empty, or of an earlier `save`, whose files are replaced.
            force: write beside whatever else is there.

        Raises:
            InputError: if ``folder`` is a file, or holds other files without ``force``.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise fail("save", "folder", "be a folder", f"the file {target}")
        others = sorted({path.name for path in target.iterdir()} - {WEIGHTS, OPTIONS}) if target.exists() else []
        if others and not force:
            raise fail("save", "folder", "hold nothing else (force writes all the same)", f"{target} with {others[0]}")
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / WEIGHTS) as temporary:
            save_file({name: w.detach().contiguous() for name, w in self.trained_parameters().items()}, temporary)
        write_whole(target / OPTIONS, self.options.model_dump_json(indent=2) + "\n")
        return target

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> "SharedLLM":
        """What `save` wrote, on the model that it was made from.

        Raises:
            InputError: if the folder does not hold it, or it is of a model with other layers.
        """
        source = Path(folder)
        for name in (WEIGHTS, OPTIONS):
            if not (source / name).is_file():
                raise fail("load", "folder", f"hold {name}", source)
        try:
            options = SharedOptions.model_validate_json((source / OPTIONS).read_text(encoding="utf-8"))
            weights = load_file(source / WEIGHTS)
        except (ValidationError, SafetensorError) as error:
            raise fail("load", "folder", "hold what save wrote", f"{source} ({str(error).splitlines()[0]})") from None
        shared = cls(model, options)
        wanted = {name: tuple(weight.shape) for name, weight in shared.trained_parameters().items()}
        if {name: tuple(weight.shape) for name, weight in weights.items()} != wanted:
            raise fail("load", "model", "be the one that was saved", f"{type(model).__name__} of other layers or sizes")
        shared.load_state_dict(weights, strict=False)
        return shared
