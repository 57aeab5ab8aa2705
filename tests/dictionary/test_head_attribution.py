"""Attribution to heads and sources: by loops, and parts that sum to the whole."""

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary.head_attribution import head_contributions, head_weights, source_contributions
from paucity.models.harvest import harvest
from paucity.models.places import find_hook


def test_shares_match_loops():
    atoms = torch.randn(5, 12)
    atoms[3] = 0
    wanted = torch.zeros(5, 3)
    for i in range(5):
        norms = [sum(float(v) ** 2 for v in atoms[i, 4 * h : 4 * h + 4]) ** 0.5 for h in range(3)]
        for h in range(3):
            wanted[i, h] = norms[h] / sum(norms) if sum(norms) else 0
    torch.testing.assert_close(head_weights(atoms, 3), wanted)
    assert torch.equal(head_weights(-2 * atoms, 3), head_weights(atoms, 3))


def test_parts_sum_to_the_pre_activation_in_a_model(tiny_model):
    """Over heads to the whole, over sources to the head's part, with the patterns and values of a real forward."""
    model, ids = tiny_model("llama"), torch.randint(3, 64, (1, 7))
    model.set_attn_implementation("eager")
    hooks = [find_hook(model, name) for name in ("heads.1", "model.layers.1.self_attn.v_proj")]
    z, v = harvest(model, hooks, ids).values()
    with torch.no_grad():
        pattern = model(input_ids=ids, output_attentions=True).attentions[1][0]
    direction = torch.randn(32)
    given = head_contributions(z, direction, 4)
    torch.testing.assert_close(given.sum(1), z @ direction)
    for head in range(4):
        values = v.view(7, 2, 8)[:, head // 2]
        part = source_contributions(pattern[head], values, direction.view(4, 8)[head])
        torch.testing.assert_close(part.sum(1), given[:, head])
        torch.testing.assert_close(part[5, 2], pattern[head][5, 2] * (values[2] @ direction.view(4, 8)[head]))


def test_bad_input():
    with pytest.raises(InputError, match=r"heads must divide the width of atoms \(12\), got 5"):
        head_weights(torch.ones(2, 12), 5)
    with pytest.raises(InputError, match=r"direction must have shape \[8\], got \[4\]"):
        source_contributions(torch.ones(1, 3), torch.ones(3, 8), torch.ones(4))
    with pytest.raises(InputError, match=r"values must have shape \[3, any\], got \[2, 8\]"):
        source_contributions(torch.ones(1, 3), torch.ones(2, 8), torch.ones(8))
