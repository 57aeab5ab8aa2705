"""A mask finds its parameter through what wraps the model; tied parameters are one; doubt is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from paucity.checks import InputError
from paucity.ops.formats import Masks
from paucity.ops.formats.mask_names import locate, plain_name


class Tied(nn.Module):
    """An embedding whose weight is the output head, between a hidden layer."""

    def __init__(self):
        super().__init__()
        self.emb, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.emb(tokens)).tanh())


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def make_masks(model, names, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return Masks({name: torch.rand(model.get_parameter(name).shape, generator=gen) < 0.5 for name in names})


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 1


def compiled(model):
    return torch.compile(model, backend="eager")


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", Half())
    parametrize.register_parametrization(model[2], "weight", Half())
    return model


def nested(model):
    return AveragedModel(compiled(nn.DataParallel(model)))


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in model))


def moved(model):
    return copy.deepcopy(model).to(torch.bfloat16)


WRAPPERS = {
    "compile": compiled,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "parametrized": parametrized,
    "nested": nested,
    "checkpoint": checkpointed,
    "copied and cast": moved,
}
NAMES = ["0.weight", "2.weight"]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_masks_go_both_ways_through_wrappers(wrap):
    plain = make_model()
    masks = make_masks(plain, NAMES)
    wrapped = wrap(make_model())
    masks.apply_(wrapped)
    assert masks.violations(wrapped) == {}
    assert masks.achieved_in(wrapped).layers == masks.sparsity(wrapped).layers == masks.sparsity().layers
    assert Masks.from_zeros(wrapped) == masks, "names of a wrapped model are those of the plain one"
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    masks.install(optimizer, wrapped)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert masks.violations(wrapped) == {}
    by_wrapped_name = Masks({place.path: masks[place.name] for place in locate("test", wrapped, masks)})
    by_wrapped_name.apply_(plain)
    assert masks.violations(plain) == {}


def test_model_compiled_before_and_after_masking_computes_the_same():
    plain, x = make_model(), torch.randn(4, 5)
    masks = make_masks(plain, NAMES)
    before = torch.compile(plain, backend="aot_eager")
    dense = before(x)
    masks.apply_(before)
    after = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    sparse = plain(x)
    assert not torch.allclose(dense, sparse)
    torch.testing.assert_close(before(x), sparse)
    torch.testing.assert_close(after(x), sparse)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    masks.install(optimizer, before)  # the plain model's optimizer, masks through the compiled one
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        optimizer.zero_grad()
        before(x).square().sum().backward()
        step()
    assert masks.violations(plain) == {}
    assert not torch.equal(plain(x), sparse)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.base_model.model.model.layers.0.q.base_layer.weight", "model.layers.0.q.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("_orig_mod.0.parametrizations.weight.original", "0.weight"),
        ("a.base_layer.base_layer.gate_up_proj", "a.gate_up_proj"),
        ("model.model.weight", "model.model.weight"),
        ("modules.weight", "modules.weight"),
        ("0.parametrizations.weight.original1", "0.parametrizations.weight.original1"),
        ("parametrizations.weight.original.weight", "parametrizations.weight.original.weight"),
    ],
)
def test_plain_name(name, plain):
    assert plain_name(name) == plain


def test_tied_parameters_are_one():
    model = Tied()
    once = make_masks(model, ["head.weight", "hidden.weight"])
    twice = Masks({**dict(once.items()), "emb.weight": once["head.weight"].clone()})
    for masks in (once, twice):
        report = masks.sparsity(model)
        assert (report.num_layers, report.num_parameters) == (2, 66 + 36)
        assert report.num_model_parameters == 66 + 36 + 6
    assert twice.sparsity().num_parameters == 66 + 66 + 36, "without a model nobody knows"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    twice.install(optimizer, model)
    model(torch.arange(11)).square().sum().backward()
    optimizer.step()
    assert not model.emb.weight[~once["head.weight"]].any()
    assert list(Masks.from_zeros(model)) == ["emb.weight", "hidden.weight"]
    other = Masks({"head.weight": once["head.weight"], "emb.weight": ~once["head.weight"]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"agree where parameters are tied, got head\.weight and emb\.weight"):
        other.apply_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_doubt_and_unknown_names_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "module": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    mask = torch.eye(2).bool()
    Masks({"module.a.weight": mask}).apply_(model)  # an exact name is no doubt
    assert model["a"].weight.all()
    with pytest.raises(InputError, match=r"_orig_mod\.a\.weight must mean one parameter .* a\.weight and module\.a"):
        Masks({"_orig_mod.a.weight": mask}).apply_(model)
    model["module"]["a"] = model["a"]  # one module at two places is one parameter
    Masks({"_orig_mod.a.weight": mask}).apply_(model)
    assert model["a"].weight.count_nonzero() == 2
    wrapped = torch.compile(make_model(), backend="eager")
    with pytest.raises(InputError, match=r"got 1\.weight \(nearest: 2\.weight, 0\.weight"):
        Masks({"1.weight": mask}).apply_(wrapped)
    with pytest.raises(InputError, match=r"0\.weight must be in memory, got a parameter on the meta device"):
        make_masks(make_model(), NAMES).apply_(make_model().to("meta"))


def test_parametrization_that_fills_removed_entries_is_refused():
    model = make_model()
    masks = make_masks(model, ["2.weight", "0.weight"])
    parametrize.register_parametrization(model[2], "weight", Half())
    parametrize.register_parametrization(model[0], "weight", Shifted())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"0\.weight must stay 0 under its parametrization"):
        masks.apply_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(masks.violations(model)) == {"0.weight", "2.weight"}
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    masks.apply_(model)
    parametrize.remove_parametrizations(model[2], "weight")
    assert masks.violations(model) == {}
