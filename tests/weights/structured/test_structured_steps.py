"""Scores against loops, and the steps of a recipe: what they remove, report and give back."""

import pytest
import torch
from pydantic import ValidationError

from paucity.checks import InputError
from paucity.models.applied import Applied
from paucity.models.load import Loaded
from paucity.weights.apply import apply_step, options_for
from paucity.weights.structured import find_units
from paucity.weights.structured.cfsp import cfsp_score
from paucity.weights.structured.influence import block_influence
from paucity.weights.structured.recover import adaptive_ranks
from paucity.weights.structured.scores import activation_unit_score, magnitude_unit_score, taylor_unit_scores


def tokens(count=2, length=12):
    return [torch.randint(0, 64, (1, length)) for _ in range(count)]


def step(model, method, calibration=(), **options):
    return apply_step(
        Loaded(model, None, "test"), method, options_for(method).model_validate(options), list(calibration)
    )


@pytest.mark.parametrize("relative", ["row", "column"])
def test_fine_score_matches_the_paper_by_loops(relative):
    down, gate, up, norm = torch.randn(3, 5), torch.randn(5, 3), torch.randn(5, 3), torch.rand(5) + 0.1
    found = cfsp_score(down, [gate, up], norm, weight_power=0.5, power=2.0, relative=relative)
    for j in range(5):
        total = 0.0
        for term in (down.abs() * norm**0.5, gate.abs().T, up.abs().T):
            for i in range(3):
                total += term[i, j] / (term[i].sum() if relative == "row" else term[:, j].sum()) / 3
        assert float(found[j]) == pytest.approx(float(total * norm[j] ** 2), rel=1e-5)
    if relative == "column":  # what the authors' code comes to: the weights cancel
        assert torch.equal(found.argsort(), norm.argsort())


def test_block_influence_matches_loops():
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    y[0] = 0
    for metric in ("cosine", "angular"):
        found = block_influence(x, y, metric=metric)
        for i in range(4):
            cos = 0.5 if i == 0 else float(x[i] @ y[i] / (x[i].norm() * y[i].norm()))
            expected = 1 - cos if metric == "cosine" else torch.tensor(cos).arccos() / torch.pi
            assert float(found[i]) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_unit_scores_match_loops(tiny_model):
    model = tiny_model("llama")
    heads, neurons = find_units(model, "heads")[1], find_units(model, "neurons")[1]
    attn, mlp, norm = model.model.layers[1].self_attn, model.model.layers[1].mlp, torch.rand(48)
    magnitude, activation = magnitude_unit_score(model, heads), activation_unit_score(model, neurons, norm)
    for head in range(4):
        rows, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        total = attn.q_proj.weight[rows].square().sum() + attn.o_proj.weight[:, rows].square().sum()
        total += (attn.k_proj.weight[group].square().sum() + attn.v_proj.weight[group].square().sum()) / 2
        assert float(magnitude[head // 2, head % 2]) == pytest.approx(float(total.sqrt()), rel=1e-5)
    for j in range(48):
        assert float(activation[j]) == pytest.approx(float(mlp.down_proj.weight[:, j].abs().sum() * norm[j]), rel=1e-5)


def test_taylor_is_the_gradient_of_a_gate(tiny_model):
    model, batches = tiny_model("llama"), tokens()
    heads = find_units(model, "heads")
    found = taylor_unit_scores(model, heads, batches)["model.layers.0.self_attn"]
    expected = torch.zeros(4)
    for ids in batches:
        gate = torch.ones(4, requires_grad=True)

        def scale(module, args, gate=gate):
            return (args[0] * gate.repeat_interleave(8),)

        handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(scale)
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        handle.remove()
        expected += gate.grad.abs() / 2
    assert torch.allclose(found.flatten(), expected, rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


CASES = [
    ("cfsp", {"sparsity": 0.5}),
    ("heads", {"sparsity": 0.5, "score": "activation"}),
    ("heads", {"sparsity": 0.5}),
    ("neurons", {"sparsity": 0.5, "allocation": "owl", "score": "taylor"}),
    ("neurons", {"sparsity": 0.5, "allocation": "cfsp", "score": "cfsp", "sharpness": 5.0, "round_to": 8}),
    ("layers", {"sparsity": 0.5}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_steps_remove_report_and_come_back(tiny_model, name, method, options):
    if name == "qwen3_moe" and options.get("round_to"):
        options = options | {"round_to": 4}
    model, ids, calibration = tiny_model(name), torch.randint(0, 64, (1, 9)), tokens()
    dense, count = model(ids).logits, sum(p.numel() for p in model.parameters())
    applied = step(model, method, calibration, **options)
    small, left = model(ids).logits, sum(p.numel() for p in model.parameters())
    assert isinstance(applied, Applied)
    assert applied.masks is None
    assert applied.state()["sparsity"] == pytest.approx(1 - left / count)
    assert applied.density()
    assert all(0 <= share <= 1 for share in applied.density().values())
    assert min(applied.density().values()) < 1
    applied.remove()
    assert torch.equal(model(ids).logits, dense)
    zeroed = step(model, method, calibration, shrink=False, **options)
    assert torch.allclose(model(ids).logits, small, atol=1e-5)
    assert zeroed.masks.achieved_in(model).num_zeros == count - left or method == "layers"
    zeroed.remove()
    assert torch.equal(model(ids).logits, dense)


def test_cfsp_gives_more_to_what_turns_more(tiny_model):
    model, calibration = tiny_model("llama"), tokens()
    applied = step(model, "cfsp", calibration, sparsity=0.5, sharpness=20.0)
    angular, sizes = applied.state()["importance"], list(applied.state()["sizes"].values())
    assert sum(sizes) == 48
    assert (sizes[0] > sizes[1]) == (angular[0] > angular[1])


def test_steps_of_neurons_add_up_to_the_sparsity_or_the_miss_is_noted(tiny_model):
    model, calibration = tiny_model("llama"), tokens()
    options = {"sparsity": 0.5, "allocation": "cfsp", "sharpness": 20.0, "round_to": 16}
    applied = step(model, "neurons", calibration, **options)  # shares of 1.2 and 1.8 steps, say
    sizes = list(applied.state()["sizes"].values())
    assert (sum(sizes), sorted(sizes)) == (48, [16, 32])
    assert not any("were asked for" in note for note in applied.state()["notes"])
    applied.remove()
    applied = step(model, "neurons", calibration, sparsity=0.5, round_to=16)
    assert list(applied.state()["sizes"].values()) == [16, 16]
    assert (
        "66.7% of the neurons were removed, 50.0% were asked for: they go in steps of 16." in applied.state()["notes"]
    )


def test_ranks_follow_importance_and_keep_the_total():
    assert adaptive_ranks([1.0, 1.0, 1.0], rank=4) == [4, 4, 4]
    assert adaptive_ranks([0.0, 100.0, 0.0], rank=4) == [1, 10, 1]
    ranks = adaptive_ranks([0.5, 0.14, 0.13, 0.12, 0.23], rank=4)
    assert (sum(ranks), sorted(ranks, reverse=True)[0]) == (20, ranks[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recovery_lowers_the_loss_and_can_be_undone(tiny_model, name, tmp_path):
    pytest.importorskip("peft")
    model, calibration = tiny_model(name), tokens(4, 16)
    dense = model(calibration[0]).logits
    recovery = {"steps": 30, "rank": 2, "learning_rate": 1e-2, "batch_size": 4}
    applied = step(model, "cfsp", calibration, sparsity=0.5, recovery=recovery)
    found = applied.state()["recovery"]
    assert found["loss_last"] < found["loss_first"] - 0.1
    assert sum(found["ranks"]) == 4
    assert not any("lora" in key for key in model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(calibration[0]).logits, model(calibration[0]).logits, atol=1e-5)
    applied.remove()
    assert torch.equal(model(calibration[0]).logits, dense)


def test_bad_input_leaves_the_model_as_it_was(tiny_model):
    model, nan = tiny_model("llama"), tiny_model("llama")
    nan.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    cases = [
        (model, "heads", {"sparsity": 0.9}, tokens(), "sparsity must leave at least one of 2 group heads, got 0.9"),
        (model, "neurons", {"round_to": 7}, tokens(), r"round_to must divide the neurons of model.layers.0.mlp \(48\)"),
        (model, "neurons", {}, [], "calibration must hold at least one batch"),
        (model, "cfsp", {}, [torch.tensor([[99]])], "token ids from 0 to 63, got 99"),
        (model, "heads", {}, [torch.tensor([[3]])], "length of batches must be at least 2, got 1"),
        (nan, "cfsp", {}, tokens(), "NaN or infinity at the input of model.layers.0.mlp.down_proj"),
        (
            tiny_model("gpt2"),
            "heads",
            {"unit": "query"},
            tokens(),
            "unit must be group in a model whose queries share no",
        ),
    ]
    for target, method, options, calibration, message in cases:
        before = {name: id(p) for name, p in target.named_parameters()}
        with pytest.raises(InputError, match=message):
            step(target, method, calibration, **options)
        assert {name: id(p) for name, p in target.named_parameters()} == before
    step(model, "cfsp", tokens(), sparsity=0.5, sharpness=20.0)
    with pytest.raises(InputError, match="neurons: model must be saved and loaded anew, as an earlier step fills up"):
        step(model, "neurons")
    for options in ({"score": "magnitud"}, {"shrink": False, "recovery": {}}, {"sparsity": 1.0}, {"rank": 3}):
        with pytest.raises(ValidationError):
            options_for("neurons").model_validate(options)
