"""Masks through training, averaging, merging, saving and reloading; reports against loops; what they refuse."""

import json
import os
import resource

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import Masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def make_masks(seed=1, **more):
    gen = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in make_model().named_parameters() if p.ndim == 2}
    return Masks({name: torch.rand(shape, generator=gen) < 0.5 for name, shape in shapes.items()}, **more)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()


def removed(masks, model):
    return torch.cat([model.get_parameter(name)[~mask] for name, mask in masks.items()]).detach()


def test_apply_changes_only_removed_entries():
    model, before, masks = make_model(), make_model(), make_masks()
    model[0].weight.data[~masks["0.weight"]] = float("inf")
    masks.apply_(model)
    for name, parameter in model.named_parameters():
        kept = masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        for now, was, keep in zip(
            parameter.flatten().tolist(), before.get_parameter(name).flatten().tolist(), kept.flatten(), strict=True
        ):
            assert now == (was if keep else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_install_survives_optimizer_and_its_reload(name):
    model, masks = make_model(), make_masks()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # the state is dense before
    handle = masks.install(optimizer, model)
    assert not removed(masks, model).any()
    for reload in (False, True):
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer)
        assert not removed(masks, model).any()
        for which, mask in masks.items():
            state = optimizer.state[model.get_parameter(which)]
            shaped = [v for v in state.values() if torch.is_tensor(v) and v.shape == mask.shape]
            assert shaped
            assert not any(value[~mask].any() for value in shaped)
            assert model.get_parameter(which)[mask].all()
            assert "step" not in state or state["step"] > 0
        assert model[0].bias.all()
    handle.remove()
    train(model, optimizer)
    assert removed(masks, model).any()


def test_survives_averaging_merge_and_reload(tmp_path):
    model, masks = make_model(), make_masks()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    averaged = AveragedModel(model)  # copied before masking, so dense
    masks.install(optimizer, model)
    train(model, optimizer)
    for named in (masks, masks.with_prefix("module.")):
        assert named.achieved_in(averaged).num_zeros == 0
    masks.apply_(averaged)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert masks.achieved_in(averaged).achieved == masks.sparsity().achieved
    with torch.no_grad():
        model[0].weight += torch.randn(7, 2) @ torch.randn(2, 5)  # a merged low-rank update
    assert removed(masks, model).any()
    masks.apply_(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = make_model()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        again.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert Masks.from_zeros(again) == masks == Masks.from_zeros(again, ["2.weight", "0.weight"])


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4), st.integers(0, 99))
def test_save_and_load(tmp_path_factory, shapes, seed):
    gen = torch.Generator().manual_seed(seed)
    masks = Masks({f"m.{i}": torch.rand(shape, generator=gen) < 0.5 for i, shape in enumerate(shapes)}, nominal=0.25)
    path = tmp_path_factory.getbasetemp() / "masks.safetensors"
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks
    assert {name: mask.shape for name, mask in loaded.items()} == {name: mask.shape for name, mask in masks.items()}
    assert loaded.sparsity() == masks.sparsity()
    assert loaded.nominal == 0.25


def test_save_is_packed_and_whole_or_not_at_all(tmp_path, monkeypatch):
    path, masks = tmp_path / "m.safetensors", make_masks(nominal=0.5)
    masks.save(path)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("0.weight").shape == (5,)  # 35 entries
        assert json.loads(file.metadata()["shapes"]) == {"0.weight": [7, 5], "2.weight": [3, 7]}
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        make_masks(seed=2).save(path)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert Masks.load(path) == masks


def test_a_full_disk_is_an_os_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match=r"m\.safetensors could not be written"):
            make_masks().save(tmp_path / "m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


def test_reports():
    masks, model = make_masks(nominal=0.5), make_model()
    report = masks.sparsity()
    zeros = {name: sum(not keep for keep in mask.flatten().tolist()) for name, mask in masks.items()}
    assert (report.nominal, report.num_layers, report.num_parameters) == (0.5, 2, 56)
    assert report.num_zeros == sum(zeros.values())
    assert report.achieved == report.num_zeros / 56
    assert report.layers == {"0.weight": zeros["0.weight"] / 35, "2.weight": zeros["2.weight"] / 21}
    assert masks.achieved_in(model).num_zeros == 0
    masks.apply_(model)
    assert masks.achieved_in(model) == masks.sparsity(model)
    assert masks.achieved_in(model).layers == report.layers
    assert (report.of_model, masks.sparsity(model).of_model) == (None, report.num_zeros / 66)
    assert repr(masks) == f"Masks(2 layers, 56 parameters, sparsity {report.achieved:.4f}, nominal 0.5)"


def test_table_adds_up_and_violations_are_counted():
    masks, model = make_masks(nominal=0.5), make_model()
    lines = [line.split() for line in masks.table(model).splitlines()]
    assert [line[0] for line in lines] == ["layer", "0.weight", "2.weight", "2", "whole", "asked"]
    layers, total, whole = lines[1:3], lines[3], lines[4]
    assert [line[1] for line in layers] == ["7x5", "3x7"]
    assert sum(int(line[2]) for line in layers) == int(total[2]) == 56
    assert sum(int(line[3]) for line in layers) == int(total[3]) == int(whole[3])
    assert whole[2:] == ["66", total[3], f"{int(total[3]) / 66:.2%}"]
    assert lines[-1][-1] == "50.00%"
    assert len(masks.table().splitlines()) == 5
    gone = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert masks.violations(model) == gone
    masks.apply_(model)
    assert masks.violations(model) == {}
    with torch.no_grad():
        model[0].weight[tuple((~masks["0.weight"]).nonzero()[0])] = float("nan")
        model[2].weight[masks["2.weight"]] = 0  # a kept entry may be 0
    assert masks.violations(model) == {"0.weight": 1}


def test_from_zeros_leaves_dense_layers_out():
    masks, model = make_masks(), make_model()
    Masks({"0.weight": masks["0.weight"]}).apply_(model)
    assert list(Masks.from_zeros(model)) == ["0.weight", "2.weight"]
    sparse = Masks.from_zeros(model, min_sparsity=0.01)
    assert sparse == Masks({"0.weight": masks["0.weight"]})
    with pytest.raises(InputError, match="have a parameter with at least 99% zeros, got none among 2"):
        Masks.from_zeros(model, min_sparsity=0.99)
    with pytest.raises(InputError, match=r"min_sparsity must be in \[0, 1\], got 2"):
        Masks.from_zeros(model, min_sparsity=2)


def test_algebra_change_and_overlap():
    a, b = Masks({"w": torch.tensor([[1, 1, 0, 0]]).bool()}), Masks({"w": torch.tensor([[1, 0, 1, 0]]).bool()})
    assert (a & b)["w"].tolist() == [[True, False, False, False]]
    assert (a | b)["w"].tolist() == [[True, True, True, False]]
    assert (a.change(b), a.change(a)) == (2, 0)
    assert (a.overlap(b), a.overlap(a)) == (1 / 3, 1.0)
    assert a == Masks({"w": a["w"].clone()}, nominal=0.5) == a.to("cpu")
    assert a != b
    assert a != Masks({"v": a["w"]})
    assert a != Masks({"w": a["w"][:, :3]})
    with pytest.raises(InputError, match="other must mask the same parameters, got a difference in v, w"):
        a & Masks({"v": a["w"]})
    with pytest.raises(InputError, match=r"other\['w'\] must have shape \[1, 4\], got \[1, 3\]"):
        a.change(Masks({"w": a["w"][:, :3]}))


def test_bad_input_changes_nothing(tmp_path):
    model, good = make_model(), make_masks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for wrong in ({"9.weight": good["0.weight"]}, {"2.weight": good["2.weight"].T}):
        masks = Masks({"0.weight": good["0.weight"], **wrong})
        for call in (lambda m: m.apply_(model), lambda m: m.install(optimizer, model), lambda m: m.achieved_in(model)):
            with pytest.raises(InputError, match=r"got 9\.weight|must have shape \[3, 7\], got \[7, 3\]"):
                call(masks)
    with pytest.raises(InputError, match="optimizer must hold at least one masked parameter"):
        good.install(OPTIMIZERS["sgd"](make_model().parameters()), model)
    with pytest.raises(InputTypeError, match="optimizer must be an Optimizer"):
        good.install(model, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    for masks, nominal in (({}, None), ({"w": torch.ones(2)}, None), ({"w": torch.ones(2).bool()}, 1.0)):
        with pytest.raises(InputError, match=r"Masks: .* must"):
            Masks(masks, nominal=nominal)
    with pytest.raises(InputError, match=r"a parameter of the model, got 1\.weight"):
        Masks.from_zeros(model, ["1.weight"])
    (tmp_path / "bad").write_bytes(b"no")
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    save_file({"w": torch.ones(1).byte()}, tmp_path / "size", {"format": "paucity.masks.1", "shapes": '{"w": [9]}'})
    for name in ("none", "bad", "other", "size"):
        with pytest.raises(InputError, match=r"Masks\.load: path must be"):
            Masks.load(tmp_path / name)
    with pytest.raises(InputError, match="path must be a file in an existing folder"):
        good.save(tmp_path / "none" / "m")
