import math
from itertools import combinations

import pytest
import torch

from paucity.checks import InputError
from paucity.measure.questions import Summary
from paucity.measure.summary import rouge_l, summarise

ITEMS = [Summary("A long text on cats.\n", "Summary:", " cats."), Summary("Of dogs.\n", "Summary:", " dogs and more.")]


def naive_lcs(a, b):
    for size in range(min(len(a), len(b)), 0, -1):
        if set(combinations(a, size)) & set(combinations(b, size)):
            return size
    return 0


@pytest.mark.parametrize(
    ("text", "reference"),
    [("a b c d", "b d"), ("the cat sat", "cat the sat on the mat"), ("x", "y"), ("a a b", "a b a a"), ("B a", "b")],
)
def test_rouge_matches_all_subsequences(text, reference):
    a, b = text.lower().split(), reference.lower().split()
    size = naive_lcs(a, b)
    precision, recall = size / len(a), size / len(b)
    f1 = 2 * precision * recall / (precision + recall) if size else 0.0
    assert rouge_l(text, reference) == pytest.approx(f1)


def test_rouge_ends():
    assert rouge_l("Same, words!", "same words") == 1.0
    assert (rouge_l("", ""), rouge_l("", "a"), rouge_l("a", "")) == (1.0, 0.0, 0.0)


def test_bits_match_one_token_at_a_time(llama, tokenizer):
    found = summarise(llama, tokenizer, ITEMS, write=False)
    for item, bits in zip(ITEMS, found.bits, strict=True):
        for text, got in zip((item.prompt, item.document + item.prompt), bits, strict=True):
            ids, start = tokenizer(text + item.reference)["input_ids"], len(tokenizer(text)["input_ids"])
            total = 0.0
            with torch.no_grad():
                for i in range(start, len(ids)):
                    total -= float(
                        llama(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]]
                    )
            assert got == pytest.approx(total / math.log(2), rel=1e-4)
    saved = sum(without - given for without, given in found.bits)
    assert found.gain.value == pytest.approx(saved / sum(found.num_bytes))
    assert found.rouge is None


def test_what_is_written_ends_at_a_stop(llama, tokenizer):
    free = [Summary(item.document, item.prompt, item.reference, ("\x00never",)) for item in ITEMS]
    texts = summarise(llama, tokenizer, free).written
    stop = texts[0][1]
    stopped = summarise(llama, tokenizer, [Summary(ITEMS[0].document, "Summary:", " cats.", (stop, "\x00"))])
    assert stopped.written == (texts[0][: texts[0].index(stop)],)
    assert stopped.rouge is not None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "summaries must hold at least one document"),
        ([Summary("a" * 2048, "b", "c")], "document must fit with its summary into the model's context of 2048"),
        ([Summary("a", "b", "c", ())], "stops must hold at least one"),
    ],
)
def test_bad_input(llama, tokenizer, items, message):
    with pytest.raises(InputError, match=message):
        summarise(llama, tokenizer, items)
