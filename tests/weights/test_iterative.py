"""Iterative magnitude pruning, its folder and its controls."""

import pytest
import torch
from torch import nn

from paucity.checks import InputError
from paucity.ops.formats import Masks
from paucity.weights.iterative import Phase, iterative_magnitude, round_sparsities
from paucity.weights.ticket_controls import random_masks, reinitialise, train_control

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
STEPS = 12


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def train(model, phase):
    """Full batches, a rate that falls to a tenth."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if phase.masks is not None:
        phase.masks.install(optimizer, model)
    model.train()
    for step in range(phase.start, STEPS if phase.stop is None else phase.stop):
        optimizer.param_groups[0]["lr"] = 0.01 if phase.fine_tune else 0.1 * (1 - 0.9 * step / STEPS)
        loss = (model(X) - Y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": float(loss.detach())}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def naive(rewind, k, sparsities, scope):
    """The algorithm, written out."""
    model = net()
    if k:
        train(model, Phase(0, None, 0, k))
    back, masks = state(model), {n: torch.ones_like(p) for n, p in model.named_parameters() if p.ndim == 2}
    train(model, Phase(0, None, k))
    for r, sparsity in enumerate(sparsities, 1):
        size = {n: p.numel() for n, p in model.named_parameters() if n in masks}
        entries = [(abs(v), n, i) for n in masks for i, v in enumerate(model.get_parameter(n).flatten().tolist())]
        entries = [(v if masks[n].flatten()[i] else -1.0, n, i) for v, n, i in entries]
        for group in [list(masks)] if scope == "global" else [[n] for n in masks]:
            ranked = sorted((e for e in entries if e[1] in group), key=lambda e: e[0])
            for _, n, i in ranked[: round(sparsity * sum(size[n] for n in group))]:
                masks[n].view(-1)[i] = 0
        if rewind == "weights":
            model.load_state_dict(back)
        for n, mask in masks.items():
            model.get_parameter(n).data.mul_(mask)
        train(model, Phase(r, Masks({n: m.bool() for n, m in masks.items()}), k, fine_tune=rewind == "none"))
    return model, masks


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "none"])
@pytest.mark.parametrize(("k", "scope"), [(0, "global"), (4, "layer")])
def test_matches_the_algorithm_written_out(rewind, k, scope):
    model = net()
    tickets = iterative_magnitude(model, train, sparsity=0.6, rate=0.4, rewind=rewind, rewind_step=k, scope=scope)
    expected, masks = naive(rewind, k, round_sparsities(0.6, rate=0.4), scope)
    assert len(tickets.rounds) == 3
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: int(mask.sum()) for name, mask in tickets.masks.items()
    }
    assert same(state(model), state(expected))
    for earlier, later in zip(tickets.rounds, tickets.rounds[1:], strict=False):
        assert (earlier.masks | later.masks) == earlier.masks  # what is removed stays so
        assert later.masks.achieved_in(model).achieved >= later.sparsity - 0.01
    assert [row["achieved"] for row in tickets.to_json()] == pytest.approx([0, 0.4, 0.6], abs=0.01)


def test_rounds():
    assert round_sparsities(0.9, rounds=1) == [0.9]
    assert round_sparsities(0.75, rounds=2) == pytest.approx([0.5, 0.75])
    assert round_sparsities(0.36) == pytest.approx([0.2, 0.36])
    assert round_sparsities(0.1) == [0.1]


class Killed(Exception):
    pass


def test_a_kill_loses_the_round_it_falls_in_and_no_more(tmp_path):
    calls, options = [], {"sparsity": 0.6, "rate": 0.4, "rewind_step": 3, "folder": tmp_path / "run"}
    whole = iterative_magnitude(reference := net(), train, **options | {"folder": None})

    def killed(model, phase):
        calls.append(phase.round)
        if phase.round == 2:
            train(model, Phase(2, phase.masks, 3, 5))
            raise Killed
        return train(model, phase)

    with pytest.raises(Killed):
        iterative_magnitude(net(), killed, **options)
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files == {
        "plan.json", "rewound.safetensors",
        *(f"round_{i:03d}/{n}" for i in (0, 1) for n in ("masks.safetensors", "record.json")),
        "round_001/weights.safetensors",
    }  # fmt: skip
    (tmp_path / "run/round_002.tmp").mkdir()  # a kill while writing
    resumed, seen = net(seed=5), []

    def counted(model, phase):
        calls.append(phase.round)
        return train(model, phase)

    again = iterative_magnitude(resumed, counted, **options, on_round=lambda _, each: seen.append(each.index))
    assert calls == [0, 0, 1, 2, 2]
    assert seen == [2]
    assert same(state(resumed), state(reference))
    assert same(again.rewound, whole.rewound)
    assert [each.masks for each in again.rounds] == [each.masks for each in whole.rounds]
    finished = iterative_magnitude(last := net(seed=6), counted, **options)
    assert calls == [0, 0, 1, 2, 2]  # nothing left to do
    assert same(state(last), state(reference))
    assert finished.rounds[-1].record == whole.rounds[-1].record
    with pytest.raises(InputError, match="folder must be absent, empty or of the same plan"):
        iterative_magnitude(net(), train, **options | {"sparsity": 0.7})
    for record in ('{"sparsity": ', '{"record": {}}', "[]"):
        (tmp_path / "run/round_001/record.json").write_text(record)
        with pytest.raises(InputError, match=r"folder must hold .*record.*, got .*record\.json"):
            iterative_magnitude(net(), train, **options)


def test_random_masks_keep_as_many_in_every_layer():
    masks = Masks({"a": torch.rand(7, 9) > 0.8, "b": torch.rand(5) > 0.2}, nominal=0.5)
    drawn = random_masks(masks, seed=3)
    assert {n: int(m.sum()) for n, m in drawn.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert drawn == random_masks(masks, seed=3) != random_masks(masks, seed=4)
    assert drawn.nominal == 0.5


def test_controls_start_where_they_say(tmp_path):
    tickets = iterative_magnitude(net(), train, sparsity=0.5, rounds=1, rewind_step=4)
    seen = {}

    def look(model, phase):
        seen[name] = (state(model), phase)
        return train(model, phase)

    for name in ("ticket", "random_mask", "reinitialised"):
        record = train_control(net(seed=9), tickets, look, control=name, seed=1)
        assert record["loss"] > 0
    assert tickets.rounds[1].record == train_control(net(), tickets, train, control="ticket")
    weight = {name: values["3.weight"] for name, (values, _) in seen.items()}
    back = tickets.rewound["3.weight"]
    assert torch.equal(weight["ticket"], back * tickets.masks["3.weight"])
    assert torch.equal(weight["random_mask"], back * random_masks(tickets.masks, seed=1)["3.weight"])
    assert torch.equal(weight["reinitialised"] != 0, tickets.masks["3.weight"])
    assert not torch.equal(weight["reinitialised"], weight["ticket"])
    assert [seen[name][1].start for name in seen] == [4, 4, 0]


def test_reinitialise_follows_its_seed_and_leaves_random_numbers_alone():
    one, other = net(1), net(2)
    before = torch.get_rng_state()
    reinitialise(one, seed=7)
    reinitialise(other, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(one), state(other))
    assert not torch.equal(
        state(one)["0.weight"], state(net(7))["0.weight"]
    )  # not the weights that the seed drew first
    odd = nn.Sequential(nn.Linear(2, 2))
    odd.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(InputError, match="hold only modules with reset_parameters, got Sequential"):
        reinitialise(odd, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity must be in \(0, 1\)"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\)"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rewind": "all"}, "rewind must be one of learning_rate, none, weights"),
        ({"scope": "row"}, "scope must be one of global, layer"),
        ({"rewind_step": -1}, "rewind_step must be at least 0"),
        ({"sites": ("conv",)}, r"be in the model \(it has"),
    ],
)
def test_bad_input_is_refused_before_training(options, message):
    with pytest.raises(InputError, match=message):
        iterative_magnitude(net(), lambda *_: pytest.fail("trained"), **({"sparsity": 0.5} | options))


def test_training_that_breaks_is_said():
    def broken(model, phase):
        model[0].weight.data[0, 0] = torch.nan

    with pytest.raises(InputError, match=r"train must leave finite weights, got 0\.weight in round 0"):
        iterative_magnitude(net(), broken, sparsity=0.5)


def test_a_layer_that_empties_is_named():
    model = net()

    def keep(model, phase):
        model[3].weight.data.mul_(1e-6)

    tickets = iterative_magnitude(model, keep, sparsity=0.5, rounds=1)
    assert tickets.rounds[1].empty == ("3.weight",)
