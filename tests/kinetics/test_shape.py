"""Shapes agree with the models that transformers makes, and what is no dense decoder is refused."""

import json

import pytest
import transformers

from paucity.checks import InputError
from paucity.kinetics import Shape, shape_of

REFUSED = ("mixtral", "qwen2_moe", "qwen3_moe")


def test_parameters_and_caches_are_those_of_the_real_model(tiny_model, architecture):
    model = tiny_model(architecture)
    if architecture in REFUSED:
        with pytest.raises(InputError, match=r"must be a dense decoder .* with a mixture of experts"):
            shape_of(model.config)
        return
    shape = shape_of(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    cache = transformers.DynamicCache()
    model(model.dummy_inputs["input_ids"][:1, :3] % 64, past_key_values=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape.cache_bytes(3) == kept * shape.itemsize
    assert shape.cache * 3 == kept


def test_published_sizes():
    from paucity.claims.kinetics_attention_dominates import qwen3

    shapes = qwen3()
    sizes = {"Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191, "Qwen3-14B": 14.768}
    for name, billions in (sizes | {"Qwen3-32B": 32.762}).items():
        assert shapes[name].parameters / 1e9 == pytest.approx(billions, abs=1e-3)
    assert shapes["Qwen3-0.6B"].cache_bytes(32768) == 3.5 * 2**30
    assert shapes["Qwen3-32B"].cache_bytes(32768) == 8 * 2**30


def test_windows_bound_the_cache():
    config = transformers.Gemma2Config(num_hidden_layers=2, sliding_window=16, head_dim=8, num_key_value_heads=2)
    shape = shape_of(config, dtype="float32")
    assert shape.windows == (16, None)
    assert shape.cache_bytes(100) == (16 + 100) * 2 * 2 * 8 * 4


def test_sources(tmp_path):
    embedded = shape_of("embedded")
    assert (embedded.name, embedded.parameters, embedded.layers) == ("embedded", 4492032, 5)
    transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=48).save_pretrained(tmp_path)
    assert shape_of(tmp_path).layers == shape_of(str(tmp_path / "config.json")).layers == 1
    assert shape_of(tmp_path, dtype="float32").itemsize == 4


BAD = [
    ("absent/at/all", "must be 'embedded', a hub id or a folder with a config.json, got absent/at/all"),
    (transformers.MambaConfig(num_hidden_layers=1), "with no attention heads"),
    (transformers.DeepseekV3Config(num_hidden_layers=1), "with attention of another kind"),
    (transformers.T5Config(num_layers=1), "must be a dense decoder"),
    (3, "must be a name or a path|must be a dense decoder"),
]


@pytest.mark.parametrize(("source", "message"), BAD, ids=["absent", "mamba", "latent", "encoder", "number"])
def test_bad_sources(source, message):
    with pytest.raises(InputError, match=message):
        shape_of(source)


def test_bad_folders_and_numbers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(InputError, match="read_config: source must be"):
        shape_of(tmp_path)
    with pytest.raises(InputError, match="dtype must be one of"):
        shape_of("embedded", dtype="int7")
    options = {"parameters": 1, "linear": 1, "head": 0, "hidden": 1, "inner": 1, "dim": 1, "value_dim": 1}
    with pytest.raises(InputError, match="heads must be a multiple of the 2 key-value heads, got 3"):
        Shape(name="x", heads=3, kv_heads=2, windows=(None,), **options)
    with pytest.raises(InputError, match="windows must name at least one layer"):
        Shape(name="x", heads=2, kv_heads=2, windows=(), **options)
