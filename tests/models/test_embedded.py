"""The embedded model: what ships is what the card says, its data leaves the held-out text out, training resumes."""

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from paucity.measure.data import HELD_OUT_MODULES, held_out_python, python_documents
from paucity.measure.quality import bits_per_byte
from paucity.measure.retrieval import retrieval_accuracy
from paucity.models.embedded import folder, load_embedded
from paucity.models.embedded.corpus import Corpus, copy_sequence, encode_stream, recall_sequence, sequence
from paucity.models.embedded.ship import card_text
from paucity.models.embedded.train import _HeadLoss, architecture, checkpoint, optimizers, restore, weighted_loss


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.post_processor = None
    stream = encode_stream(tokenizer, [held_out_python()[:200_000]])
    return Corpus(stream, stream, tokenizer)


def test_weights_are_small_and_the_card_is_theirs():
    weights = folder() / "model.safetensors"
    card = json.loads((folder() / "card.json").read_text())
    assert weights.stat().st_size < 10_000_000
    assert card["held_out_modules"] == list(HELD_OUT_MODULES)
    assert (folder() / "CARD.md").read_text() == card_text(card)
    model, _ = load_embedded()
    assert sum(p.numel() for p in model.parameters()) == card["num_parameters"]
    assert model.config.max_position_embeddings >= 4096


def test_it_predicts_and_retrieves_as_the_card_says():
    model, tokenizer = load_embedded(torch.float32)
    card = json.loads((folder() / "card.json").read_text())
    text = held_out_python()
    quality = bits_per_byte(model, tokenizer, text, length=1024, max_tokens=8192)
    assert quality.bits_per_byte.low < 1.1 * card["held_out_bits_per_byte"]
    found = retrieval_accuracy(model, tokenizer, task="passkey", length=1024, filler=text, num_prompts=5)
    assert found.accuracy.high >= card["retrieval"]["passkey"]["1024"]


def test_nothing_held_out_is_in_the_training_text():
    documents = set(python_documents())
    for name in HELD_OUT_MODULES:
        marker = __import__(name).__doc__ or ""
        assert not any(len(marker) > 200 and marker in document for document in documents), name


@pytest.mark.parametrize("length", [160, 256, 1000])
def test_sequences_have_their_length_and_answers_weigh_most(corpus, length):
    rng = random.Random(0)
    for share in (0.0, 1.0):
        ids, weights = sequence(corpus, length, rng, recall_share=share)
        assert len(ids) == len(weights) == length
    ids, weights = recall_sequence(corpus, length, rng)
    assert len(ids) == len(weights) <= length
    answer = [token for token, weight in zip(ids, weights, strict=True) if weight == max(weights)]
    assert corpus.tokenizer.decode(answer).strip()
    ids, weights = copy_sequence(corpus, length, rng)
    first = [i for i, weight in enumerate(weights) if weight == 1.0]
    piece = ids[first[0] :]
    assert ids[1:].index(piece[0]) < first[0] - 1
    assert len(ids) == len(weights) <= length


def test_head_loss_is_weighted_cross_entropy():
    hidden, matrix = torch.randn(2000, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(50, (2000,)), torch.rand(2000)
    loss = _HeadLoss.apply(hidden, matrix, targets, weights)
    wanted = (torch.nn.functional.cross_entropy(hidden @ matrix.T, targets, reduction="none") * weights).sum()
    wanted = wanted / weights.sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)  # the products are in bfloat16
    for ours, naive in zip(
        torch.autograd.grad(loss, (hidden, matrix)), torch.autograd.grad(wanted, (hidden, matrix)), strict=True
    ):
        assert (ours - naive).norm() < 0.02 * naive.norm()


def test_a_checkpoint_restores_weights_and_optimizers_exactly(tmp_path):
    config = architecture(64)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 32, 48
    ids, weights = torch.randint(64, (2, 16)), torch.ones(2, 16)

    def steps(model, opts, count):
        for _ in range(count):
            weighted_loss(model, ids, weights).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()

    model = LlamaForCausalLM(config)
    opts = optimizers(model, 1e-2)
    steps(model, opts, 2)
    checkpoint(tmp_path, model, opts, {"step": 2, "tokens": 64, "seconds": 1.5})
    other = LlamaForCausalLM(config)
    other_opts = optimizers(other, 1e-2)
    assert restore(tmp_path, other, other_opts) == {"step": 2, "tokens": 64, "seconds": 1.5}
    steps(model, opts, 2)
    steps(other, other_opts, 2)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert restore(tmp_path / "absent", other, other_opts)["step"] == 0


def test_stream_separates_documents(corpus):
    stream = encode_stream(corpus.tokenizer, ["a", "b"])
    assert stream.dtype == np.uint16
    assert (stream == 0).sum() == 2
