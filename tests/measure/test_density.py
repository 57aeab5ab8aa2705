import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.measure.density import average_density, weight_density


def test_weight_density():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1, -1, 0], [0, 0, 2, -0.0]]))
    model[1].weight = nn.Parameter(torch.full((2, 2), torch.nan))  # a NaN is not a zero
    assert weight_density(model, ["0.weight", "1.weight"]) == {"0.weight": 3 / 8, "1.weight": 1.0}
    with pytest.raises(InputError, match=r"parameters of the model, got 0\.wieght \(did you mean '0\.weight'\?\)\."):
        weight_density(model, ["0.wieght"])


def test_average_density():
    density = {"a.q": 0.5, "a.up": 1.0, "b.q": 0.25, "other": 0.1}
    kinds = {"a.q": "q", "b.q": "q", "a.up": "up"}
    assert average_density(density, kinds) == {"q": 0.375, "up": 1.0}
    sizes = {"a.q": 1, "b.q": 3, "a.up": 5, "other": 1}
    assert average_density(density, kinds, sizes=sizes) == {"q": (0.5 + 0.75) / 4, "up": 1.0}
    with pytest.raises(InputError, match="none for other"):
        average_density(density, kinds, sizes={"a.q": 1, "b.q": 3, "a.up": 5})
    with pytest.raises(InputError, match=r"density of a must be in \[0, 1\], got 1\.5"):
        average_density({"a": 1.5}, {})
