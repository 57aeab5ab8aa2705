"""Names of places, on architectures with names of their own and with several towers."""

import pytest
import torch
import transformers as hf

from paucity.checks import InputError
from paucity.models.harvest import harvest
from paucity.models.places import find_hook, find_places, mlp_input, num_heads

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VISION = SMALL | {"hidden_size": 48, "image_size": 16, "patch_size": 8}


def t5():
    return hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50))


CASES = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=50)), "intermediate.dense.input"),
    "distilbert": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=50)),
        "ffn.input",
    ),
    "t5": (t5, "DenseReluDense.input"),
    "opt": (
        lambda: hf.OPTModel(
            hf.OPTConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                ffn_dim=64,
                vocab_size=50,
                word_embed_proj_dim=32,
                max_position_embeddings=64,
            )
        ),
        "layers.0.fc1.input",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_architectures(name):
    build, first = CASES[name]
    model, ids = build().eval(), torch.randint(3, 50, (2, 5))
    prefix = next(place for place in find_places(model) if place.endswith("residual.0")).removesuffix("residual.0")
    hooks = [find_hook(model, f"{prefix}{place}") for place in ("mlp.0", "attention.0", "heads.0", "heads.0.3")]
    begin = find_hook(model, mlp_input(model, hooks[0]))
    assert begin.name.endswith(first)
    found = list(harvest(model, [*hooks, begin], ids).values())
    assert [rows.shape[1] for rows in found] == [32, 32, 32, 8, 32]
    assert torch.equal(found[3], found[2][:, 24:])
    assert find_hook(model, f"{hooks[2].module}.input.3").head == (3, 4)


def test_towers():
    text = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION | {"num_attention_heads": 6}), text_config=text)
    )
    places = find_places(model)
    for kind in ("residual", "attention", "heads", "mlp"):
        assert "language_model" in places[f"{kind}.0"].module
    assert "patches.0" not in places
    tower = next(name for name in places if name.endswith("patches.0")).removesuffix("patches.0")
    assert "vision" in tower
    assert num_heads(model, places[f"{tower}heads.0"]) == 6
    assert num_heads(model, places["heads.0"]) == 4
    with pytest.raises(InputError, match=r"one of the model's towers \(.*vision.*patches.0\), got patches.0"):
        find_hook(model, "patches.0")
