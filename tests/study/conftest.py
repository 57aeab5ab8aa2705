"""A random model with bytes as tokens, and a study of it that takes a second or two."""

import pytest

from paucity.models.load import Loaded, byte_tokenizer
from paucity.study import Study

TEXT = "def f(x):\n    return x\n" * 200


@pytest.fixture
def loaded(tiny_model):
    model = tiny_model("llama", vocab_size=300)
    model.config.max_position_embeddings = 512
    return Loaded(model, byte_tokenizer(300), "tiny")


@pytest.fixture
def study(tmp_path):
    (tmp_path / "text.py").write_text(TEXT)

    def build(**fields):
        small = {
            "methods": ("sink_window", "knorm"),
            "tasks": ("passkey", "copying", "perplexity"),
            "budgets": (0.25, 0.5),
            "lengths": (400,),
            "num_prompts": 2,
            "seeds": 1,
            "repeats": 1,
            "text": str(tmp_path / "text.py"),
            "calibration_text": str(tmp_path / "text.py"),
        }
        return Study.build(**small | fields)

    return build
