"""Matching pursuit: the twins against a loop over rows and steps, gradients by differences, and refusals."""

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError, InputTypeError
from paucity.kernels.codes import decode_codes
from paucity.kernels.pursuit import atom_products, matching_pursuit
from paucity.kernels.pursuit import native as native_pursuit
from paucity.kernels.pursuit import op as kernel
from paucity.ops.pursuit import matching_pursuit as by_the_residual


def naive(x, atoms, k, signed, tolerance, stop_on_repeat):
    """The definition, in float64; also the smallest gap between a choice and the next best."""
    values, indices, gap = torch.zeros(len(x), k, dtype=torch.float64), torch.zeros(len(x), k, dtype=torch.int64), 1.0
    for row, left in enumerate(x.double()):
        for step in range(k):
            products = atoms.double() @ left
            scores = products.abs() if signed else products
            best = int(scores.argmax())
            if scores[best] <= 0:
                break
            ordered = scores.sort(descending=True).values
            gap = min(gap, float(ordered[0] - ordered[1]), float(ordered[0]))
            values[row, step], indices[row, step] = products[best], best
            left = left - products[best] * atoms[best].double()
            if left.norm() < tolerance or (stop_on_repeat and best in indices[row, :step]):
                break
    return values, indices, gap


def draw(n, m, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    return torch.randn(n, d, generator=generator).to(dtype), atoms.to(dtype)


STOPS = [(False, 0.0, False), (True, 0.0, False), (False, 2.5, False), (True, 1.5, True), (False, 0.0, True)]


@pytest.mark.parametrize(("signed", "tolerance", "stop_on_repeat"), STOPS)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 3, 20, 2), (9, 64, 33, 5), (40, 131, 20, 8), (33, 200, 48, 10)])
def test_twins_match_the_definition(twin, threads, n, m, d, k, signed, tolerance, stop_on_repeat):
    x, atoms = draw(n, m, d)
    values, indices, gap = naive(x, atoms, k, signed, tolerance, stop_on_repeat)
    assert gap > 1e-6, "the draw has a tie"
    options = {"signed": signed, "tolerance": tolerance, "stop_on_repeat": stop_on_repeat}
    for codes in (
        matching_pursuit(x.to(twin.device), atoms.to(twin.device), k, **options),
        matching_pursuit(x, atoms, k, products=atoms @ atoms.T, **options),
        by_the_residual(x, atoms, k, **options),
    ):
        assert torch.equal(codes.indices.cpu().long(), indices)
        torch.testing.assert_close(codes.values.cpu().double(), values, rtol=1e-4, atol=1e-5)


def test_the_native_twin_is_the_one_that_is_tested(native_twin, monkeypatch):
    monkeypatch.setattr(native_pursuit.reference, "pursue", None)
    x, atoms = draw(40, 16, 8)
    assert matching_pursuit(x, atoms, 4).k == 4


@pytest.mark.parametrize("signed", [False, True])
def test_bfloat16_explains_as_much(twin, signed):
    x, atoms = draw(50, 100, 32, torch.bfloat16)
    found = []
    for coder in (matching_pursuit, by_the_residual):
        codes = coder(x.to(twin.device), atoms.to(twin.device), 8, signed=signed)
        assert codes.values.dtype == torch.bfloat16
        found.append((codes.to("cpu", torch.float32).decode(atoms.float()) - x.float()).norm(dim=1))
    assert (found[0].mean() / found[1].mean() - 1).abs() < 0.02


@pytest.mark.parametrize("signed", [False, True])
def test_more_steps_never_increase_the_error(twin, signed):
    x, atoms = draw(30, 80, 24)
    codes = matching_pursuit(x.to(twin.device), atoms.to(twin.device), 40, signed=signed).to("cpu")
    left, before = x, x.norm(dim=1)
    for step in range(40):
        left = left - codes.values[:, step, None] * atoms[codes.indices[:, step].long()]
        assert (left.norm(dim=1) <= before + 1e-5).all()
        before = left.norm(dim=1)
    assert signed == bool((codes.values < 0).any())
    shorter = matching_pursuit(x.to(twin.device), atoms.to(twin.device), 7, signed=signed).to("cpu")
    assert torch.equal(shorter.indices, codes.indices[:, :7])


def test_atoms_of_any_norm_where_they_are_asked_for(twin):
    x, atoms = draw(40, 60, 16)
    atoms = atoms * torch.linspace(0.5, 1.3, 60).unsqueeze(1)
    values, indices, gap = naive(x, atoms, 4, False, 0.0, False)
    assert gap > 1e-5, "the draw has a tie"
    for codes in (
        matching_pursuit(x.to(twin.device), atoms.to(twin.device), 4, unit=False),
        by_the_residual(x, atoms, 4, unit=False),
    ):
        assert torch.equal(codes.indices.cpu().long(), indices)
        torch.testing.assert_close(codes.values.cpu().double(), values, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="atoms must have norm 1"):
        matching_pursuit(x.to(twin.device), atoms.to(twin.device), 4)


def test_rows_are_coded_for_themselves(twin):
    x, atoms = draw(40, 60, 16)
    x, atoms = x.to(twin.device), atoms.to(twin.device)
    whole = matching_pursuit(x, atoms, 6)
    alone = matching_pursuit(x[7:9].view(1, 2, 16), atoms, 6)
    assert torch.equal(whole.indices[7:9], alone.indices[0])
    torch.testing.assert_close(whole.values[7:9], alone.values[0])
    assert matching_pursuit(x[:0], atoms, 6).values.shape == (0, 6)


@pytest.mark.parametrize("stop_on_repeat", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_by_differences(signed, stop_on_repeat):
    x, atoms = draw(6, 9, 5, torch.float64, seed=3)
    x.requires_grad_(), atoms.requires_grad_()

    def run(x, atoms):
        return kernel.pursuit(x, atoms, None, 5, signed, 0.0, stop_on_repeat)[::2]

    assert torch.autograd.gradcheck(run, (x, atoms), eps=1e-7, atol=1e-5)


def test_gradients_are_those_of_the_unrolled_steps(twin):
    x, atoms = draw(50, 70, 20)
    weight = torch.randn(50, 6)
    grads = []
    for coder in (matching_pursuit, by_the_residual):
        rows, table = x.clone().requires_grad_(), atoms.clone().requires_grad_()
        codes = coder(rows.to(twin.device), table.to(twin.device), 6)
        made = decode_codes(codes.values, codes.indices, table.to(twin.device)).cpu()
        ((made - x).square().sum() + (codes.values.cpu() * weight).sum()).backward()
        grads.append((rows.grad, table.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_compiles_and_has_a_fake():
    x, atoms = draw(8, 12, 6)
    torch.library.opcheck(
        kernel.pursuit,
        (x.requires_grad_(), atoms.requires_grad_(), None, 3, False, 0.0, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_bad_input():
    x, atoms = draw(4, 6, 5)
    with pytest.raises(InputError, match=r"atoms must have shape \[any, 5\]"):
        matching_pursuit(x, atoms[:, :4], 2)
    with pytest.raises(InputError, match=r"atoms must have norm 1, got norms from"):
        matching_pursuit(x, 2 * atoms, 2)
    with pytest.raises(InputError, match=r"atoms must have norm 1"):
        matching_pursuit(x, atoms * torch.nan, 2)
    with pytest.raises(InputError, match=r"k must be at least 1, got 0"):
        matching_pursuit(x, atoms, 0)
    with pytest.raises(InputError, match=r"tolerance must be in \[0, inf\)"):
        matching_pursuit(x, atoms, 2, tolerance=-1.0)
    with pytest.raises(InputTypeError, match=r"atoms must be torch.float32 like x, got torch.float64"):
        matching_pursuit(x, atoms.double(), 2)
    with pytest.raises(InputError, match=r"products must have shape \[6, 6\]"):
        matching_pursuit(x, atoms, 2, products=torch.ones(5, 5))
    assert atom_products(atoms) is None or atom_products(atoms).shape == (6, 6)


@pytest.mark.parametrize("k", [1, 6])
def test_autocast_changes_nothing(k):
    generator = torch.Generator().manual_seed(0)
    x, atoms = torch.randn(300, 32, generator=generator), torch.randn(100, 32, generator=generator)
    atoms = torch.nn.functional.normalize(atoms, dim=1)
    expected, products = matching_pursuit(x, atoms, k), atom_products(atoms)
    with torch.autocast("cpu", torch.bfloat16):
        found, made = matching_pursuit(x, atoms, k), atom_products(atoms)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)
    assert (made is None) == (products is None)
    assert made is None or torch.equal(made, products)
