"""What two claims decide by: roles of a head's features, and conversations from source."""

from collections import Counter

import pytest

from paucity.claims.attention_heads_polysemantic import clear, kind, polysemantic, role
from paucity.claims.fast_beats_concatenation import conversations


@pytest.mark.parametrize(
    ("token", "source", "wanted"),
    [
        (5, 5, "itself"),
        (5, 0, "first"),
        (5, 4, "previous"),
        (5, 2, "induction"),  # behind the earlier 7
        (5, 1, "duplicate"),
        (14, 8, "near word"),
        (14, 5, "far number"),
    ],
)
def test_the_role_of_a_source(token, source, wanted):
    ids = [1, 7, 8, 9, 10, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    words = [""] * 5 + [" 12"] + [""] * 2 + [" name"] + [""] * 6
    assert role(ids, words, token, source) == wanted


def test_what_a_token_is():
    words = (" def", "fed", " 0x1", "\n    ", "):", "_x")
    assert [kind(word) for word in words] == ["keyword", "word", "number", "space", "sign", "word"]
    assert clear(Counter({"near word": 10, "first": 10})) == "near word"
    assert clear(Counter({"near word": 9, "first": 8, "itself": 3})) == "unclear"


def test_two_features_of_another_role_make_two_roles():
    assert polysemantic({"previous": 8, "far": 2})
    assert polysemantic({"previous": 8, "far": 1, "near": 1})
    assert not polysemantic({"previous": 9, "far": 1})
    assert not polysemantic({"previous": 7, "unclear": 3})
    assert not polysemantic({})


def test_conversations_ask_for_documented_functions():
    source = '''
def short(x):
    """Give back what is given."""
    return x

def told(x):
    """Give back twice what is given.

    More of it.
    """
    y = 2 * x
    return y

class Kind:
    def bare(self):
        a = 1
        b = 2
        return a + b
'''
    (asked, answer), *more = conversations(source)
    assert not more
    assert asked == {"role": "user", "content": "Write told. Give back twice what is given."}
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("def told(x):")
    assert answer["content"].endswith("return y")
