"""Shared fixtures: seeds, tiny random models of every architecture, and a real small Llama."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, as transformers does
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, which it warns of when it is not asked for

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import nn

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, torch.get_num_threads() // _WORKERS)))  # threads that wait for a core take longest

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CONFIGURATIONS = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", _GROUPED | _MIXTURE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", _GROUPED | _MIXTURE | {"head_dim": 8, "mlp_only_layers": [0]}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 8, "sliding_window": 16}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 256}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "opt": ("OPTConfig", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
}
ARCHITECTURES = tuple(_CONFIGURATIONS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``architecture`` runs once for each of them."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """``tiny_model(architecture, vocab_size=64)``: a random model with 2 layers, in eval mode."""

    def build(architecture: str, vocab_size: int = 64) -> transformers.PreTrainedModel:
        name, options = _CONFIGURATIONS[architecture]
        config = getattr(transformers, name)(vocab_size=vocab_size, **options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms are constants at first, which would hide mistakes
            nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def stories260k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the real pretrained 260 k-parameter Llama of TinyStories, with its tokenizer."""
    source = Path(os.environ.get("PAUCITY_DATA", "")) / "stories260k"
    if "PAUCITY_DATA" not in os.environ or not source.is_dir():
        pytest.skip("needs PAUCITY_DATA/stories260k, a real pretrained model")
    folder = tmp_path_factory.mktemp("stories260k")
    _llama2c_model(source / "stories260K.bin").save_pretrained(folder)
    _llama2c_tokenizer(source / "tok512.bin").save_pretrained(folder)
    return folder


def _llama2c_model(path: Path) -> transformers.LlamaForCausalLM:
    """The float32 checkpoint of llama2.c: seven sizes, then all tensors of one sort after another."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(raw, "<i4", 7).tolist()
    weights = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    kv, head = dim * kv_heads // heads, dim // heads
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += (size := int(np.prod(shape)))
        return weights[at - size : at].view(shape)

    def half_split(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Rows (2i, 2i + 1), which rotate together there, to rows (i, i + head / 2), which do here."""
        return weight.view(layers, count, head // 2, 2, dim).transpose(2, 3).reshape(weight.shape)

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    per_layer = {"input_layernorm": take(layers, dim)}
    per_layer["self_attn.q_proj"] = half_split(take(layers, dim, dim), heads)
    per_layer["self_attn.k_proj"] = half_split(take(layers, kv, dim), kv_heads)
    per_layer["self_attn.v_proj"] = take(layers, kv, dim)
    per_layer["self_attn.o_proj"] = take(layers, dim, dim)
    per_layer["post_attention_layernorm"] = take(layers, dim)
    per_layer["mlp.gate_proj"] = take(layers, hidden, dim)
    per_layer["mlp.down_proj"] = take(layers, dim, hidden)
    per_layer["mlp.up_proj"] = take(layers, hidden, dim)
    tensors["model.norm.weight"] = take(dim)
    for name, stacked in per_layer.items():
        tensors |= {f"model.layers.{layer}.{name}.weight": stacked[layer] for layer in range(layers)}
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def _llama2c_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    """Sentencepiece BPE as llama2.c stores it: pairs that make a piece merge, the best score of the piece first."""
    raw = path.read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append((raw[at + 8 : at + 8 + size].decode(), score))
        at += 8 + size
    names = ["<unk>", "<s>", "</s>", *(piece for piece, _ in pieces[3:])]
    vocab = {name: index for index, name in enumerate(names)}
    by_score = sorted(pieces[259:], key=lambda piece: -piece[1])  # after the special tokens and the 256 bytes
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes no time, and says nothing."""
    from paucity.measure import probes

    llama = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"_STREAM": 1024, "_MATRIX": 16, "_MATRICES": 3, "_ROWS": (1, 4, 64), "_LENGTHS": (16, 32), "_KEYS": 64}
    sizes |= {"_GROUPS": (1, 4), "_TOKENS": 8, "_WIDTH": 16, "_LAYERS": (1, 2)}
    for name, value in (sizes | {"_LLAMA": llama | {"head_dim": 8, "vocab_size": 64}}).items():
        monkeypatch.setattr(probes, name, value)
