"""CRATE, SparseJEPA and the consciousness prior: loops from the papers, gradients, what they must find, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from paucity.checks import InputError
from paucity.dictionary.consciousness import ConsciousnessBottleneck
from paucity.dictionary.crate import ISTA, MSSA, Crate, CrateBlock, coding_rate, layer_terms
from paucity.dictionary.sparse_jepa import SparseJepa, draw_patches, group_lasso, kl_to_normal, train_jepa
from paucity.measure.images import Images, digits
from paucity.measure.linear_probe import linear_probe


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mssa_matches_loops():
    layer, x = MSSA(6, 2, 4).double(), rows(2, 5, 6)
    out = layer(x)
    for b in range(2):
        joined = []
        for h in range(2):
            u = layer.subspaces.weight[4 * h : 4 * h + 4]
            w = [u @ x[b, t] for t in range(5)]
            told = []
            for t in range(5):
                scores = torch.stack([w[t] @ w[s] for s in range(5)]) / math.sqrt(4)
                told.append(sum(p * each for p, each in zip(scores.softmax(0), w, strict=True)))
            joined.append(torch.stack(told))
        torch.testing.assert_close(out[b], layer.out(torch.cat(joined, 1)))


def test_ista_is_a_proximal_gradient_step():
    layer = ISTA(5, step=0.2, penalty=0.3).double()
    y = rows(7, 5)
    for row, out in zip(y, layer(y), strict=True):
        start = row.clone().requires_grad_()
        (half,) = torch.autograd.grad((row - layer.atoms @ start).square().sum() / 2, start)
        torch.testing.assert_close(out, (row - 0.2 * half - 0.2 * 0.3).clamp_min(0))
    assert torch.autograd.gradcheck(layer, [y.requires_grad_()])


def test_block_has_one_residual_and_gives_codes():
    block, x = CrateBlock(6, 3).double(), rows(2, 4, 6)
    y = F.layer_norm(x + block.attention(F.layer_norm(x, (6,))), (6,))
    torch.testing.assert_close(block(x), block.ista(y))
    codes = block.codes(x)
    torch.testing.assert_close(codes.to_dense(), block(x))
    assert bool((codes.values >= 0).all())
    assert 0 < int(codes.l0().sum()) < x.numel()
    assert isinstance(MSSA(4, 1).out, torch.nn.Identity)


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (2, 3, 4, 7)])
def test_coding_rate_matches_loops(shape):
    w = rows(*shape)
    found = coding_rate(w, epsilon=0.05)
    for b in range(shape[0]):
        total = 0.0
        for h in range(shape[1]):
            unit = w[b, h] / w[b, h].norm(dim=1, keepdim=True)
            inner = torch.eye(shape[2], dtype=w.dtype) + shape[3] / (shape[2] * 0.05) * unit @ unit.T
            total += 0.5 * float(torch.linalg.det(inner).log())
        assert float(found[b]) == pytest.approx(total, rel=1e-4)
    same = w[..., :1, :].expand(shape)
    assert bool((coding_rate(same) < coding_rate(w)).all())


@torch.no_grad()
def test_layer_terms_are_those_of_the_forward():
    torch.manual_seed(0)
    model = Crate(image_size=8, patch_size=2, width=12, depth=2, heads=3)
    images = Images(rows(5, 1, 8, 8).float(), torch.arange(5), "drawn")
    seen = []
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(out)) for block in model.blocks]
    logits = model(images.pixels)
    for handle in handles:
        handle.remove()
    terms = layer_terms(model, images, batch_size=2)
    assert logits.shape == (5, 10)
    assert [each["nonzeros"] for each in terms] == pytest.approx([float((x != 0).float().mean()) for x in seen])
    inner = model.blocks[1].attention.project(model.blocks[1].norm1(seen[0]))
    assert terms[1]["coding_rate"] == pytest.approx(float(coding_rate(inner).mean()), rel=1e-5)
    whole = model.tokens(images.pixels)[3, 1 + 5] - model.places[0, 1 + 5]
    torch.testing.assert_close(whole, model.embed(images.pixels[3, :, 2:4, 2:4].flatten()))


def test_group_lasso_matches_loops_and_has_a_gradient_at_zero():
    x = rows(3, 4, 6)
    total = sum(
        math.sqrt(2) * math.hypot(*x[i, j, 2 * g : 2 * g + 2]) for i in range(3) for j in range(4) for g in range(3)
    )
    assert float(group_lasso(x, 3)) == pytest.approx(total / 12)
    torch.testing.assert_close(group_lasso(x.mT, 3, dim=1), group_lasso(x, 3))
    zero = torch.zeros(2, 4, requires_grad=True)
    group_lasso(zero, 2).backward()
    assert bool((zero.grad == 0).all())
    assert torch.autograd.gradcheck(lambda each: group_lasso(each, 3), [x.requires_grad_()])


def test_kl_is_that_of_torch():
    mean, log_variance = rows(5, 3), rows(5, 3, seed=1)
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    wanted = torch.distributions.kl_divergence(ours, torch.distributions.Normal(torch.zeros(()).double(), 1.0))
    torch.testing.assert_close(kl_to_normal(mean, log_variance), wanted.sum(-1).mean())


def small(**weights):
    torch.manual_seed(0)
    return SparseJepa(image_size=8, patch_size=2, width=16, depth=1, heads=2, num_groups=4, **weights)


def test_hidden_patches_are_not_seen():
    model, pixels = small(kl=0.0).eval(), rows(2, 1, 8, 8).float()
    for seed in range(20):
        seen, hidden = draw_patches(4, torch.Generator().manual_seed(seed))
        assert sorted([*seen.tolist(), *hidden.tolist()]) == list(range(16))
        assert 2 <= len(hidden) <= 10
    changed = pixels.clone()
    blocks = changed.unfold(2, 2, 2).unfold(3, 2, 2)  # a view: [B, 1, 4, 4, 2, 2]
    for place in hidden.tolist():
        blocks[:, :, place // 4, place % 4] += 1
    assert not torch.equal(changed, pixels)
    torch.testing.assert_close(model.latents(changed, seen)[0], model.latents(pixels, seen)[0])
    assert not torch.equal(model.target(changed)[:, hidden], model.target(pixels)[:, hidden])


def test_the_loss_is_its_terms_and_only_the_context_learns():
    model, pixels = small(kl=0.2, group=0.3), rows(4, 1, 8, 8).float()
    parts = model.loss(pixels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(parts.loss, parts.error + 0.2 * parts.kl + 0.3 * parts.group)
    parts.loss.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.context.parameters())
    with torch.no_grad():
        model.context.places += 1
    before = model.target.places.clone()
    model.follow(0.75)
    torch.testing.assert_close(model.target.places, before + 0.25 * (model.context.places - before))


def test_jepa_trains_alike_and_groups_shrink():
    images = digits("train").take(256)
    dense, grouped, again = small(kl=0.0, group=0.0), small(kl=0.0, group=0.05), small(kl=0.0, group=0.05)
    losses = [train_jepa(each, images, steps=60, batch_size=64) for each in (dense, grouped, again)]
    first, last = (sum(float(each.error) for each in part) for part in (losses[0][:5], losses[0][-5:]))
    assert last < 0.8 * first
    assert float(losses[1][-1].group) < 0.3 * float(losses[0][-1].group)
    assert all(
        torch.equal(a, b) for a, b in zip(grouped.state_dict().values(), again.state_dict().values(), strict=True)
    )
    latents, encoder = dense.embed(images)
    assert latents.shape == encoder.shape == (256, 16)


def test_linear_probe_knows_what_is_linear():
    x = rows(600, 5)
    labels = (x @ rows(5, 3, seed=1)).argmax(1)
    apart = linear_probe(x[:400], labels[:400], x[400:], labels[400:])
    assert apart.value > 0.95
    assert apart.num_samples == 200
    mixed = (x[:, 0] * x[:, 1] > 0).long()
    assert linear_probe(x[:400], mixed[:400], x[400:], mixed[400:]).value < 0.7
    padded = torch.cat([100 * x + 7, torch.ones(600, 1)], 1)
    assert linear_probe(padded[:400], labels[:400], padded[400:], labels[400:]).value == pytest.approx(
        apart.value, abs=0.02
    )
    with pytest.raises(InputError, match="train and test must be finite"):
        linear_probe(x / 0, labels, x, labels)


def thinker(**options):
    torch.manual_seed(0)
    return ConsciousnessBottleneck(4, 2, 2, hidden=3, **options).double()


@torch.no_grad()
def test_thoughts_match_loops_and_see_few_elements():
    layer, state = thinker().eval(), rows(3, 4, 2)
    with torch.no_grad():
        layer.queries.copy_(rows(4, 3, seed=2))
        layer.content.weight.copy_(rows(3, 2, seed=3))
    thought = layer(state)
    for b in range(3):
        for j in range(4):
            scores = [float(layer.queries[j] @ (layer.keys[i] + layer.content.weight @ state[b, i])) for i in range(4)]
            chosen = sorted(sorted(range(4), key=lambda i: -scores[i])[:2])
            assert thought.codes.indices[b, j].tolist() == chosen
            inner = F.gelu(torch.cat([state[b, i] for i in chosen]) @ layer.inner[j] + layer.inner_bias[j])
            torch.testing.assert_close(thought.mean[b, j], (inner @ layer.outer[j] + layer.outer_bias[j])[:2])
    future = rows(3, 4, 2, seed=5)
    normal = torch.distributions.Normal(thought.mean, (thought.log_variance / 2).exp())
    torch.testing.assert_close(layer.loss(state, future), -normal.log_prob(future).mean())


def test_training_draws_and_lets_attention_learn():
    layer, state = thinker(), rows(50, 4, 2)
    generator = torch.Generator().manual_seed(0)
    thought = layer(state, generator)
    assert len({tuple(each) for each in thought.codes.indices[:, 0].tolist()}) > 3
    torch.testing.assert_close(thought.codes.values, torch.ones_like(thought.codes.values))
    layer.loss(state, rows(50, 4, 2, seed=1), generator).backward()
    assert float(layer.queries.grad.abs().sum()) > 0


def test_the_factor_of_a_planted_graph_is_found():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layer = ConsciousnessBottleneck(5, 1, 2, by_content=False)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)

    def draw(n):
        state, future = (torch.randn(n, 5, 1, generator=generator) for _ in range(2))
        future[:, 0] = state[:, 1] * state[:, 4]
        return state, future

    for _ in range(300):
        optimizer.zero_grad()
        layer.loss(*draw(256), generator).backward()
        optimizer.step()
    best, second = layer.statements(*draw(500))[:2]
    assert (best["target"], best["elements"]) == (0, [1, 4])
    assert best["surprise"] < second["surprise"] - 0.3
    assert layer.training


def test_bad_input():
    with pytest.raises(InputError, match="heads must divide"):
        MSSA(6, 4)
    with pytest.raises(InputError, match="step must"):
        ISTA(4, step=0.0)
    with pytest.raises(InputError, match="patch_size must divide"):
        Crate(patch_size=5)
    with pytest.raises(InputError, match="num_groups must divide"):
        group_lasso(rows(2, 5), 2)
    with pytest.raises(InputError, match="at least 4 patches a side"):
        SparseJepa(patch_size=14)
    with pytest.raises(InputError, match="k must be"):
        ConsciousnessBottleneck(3, 1, 4)
    with pytest.raises(InputError, match=r"state must have shape \[3, 4, 2\]"):
        thinker()(rows(3, 5, 2))
    with pytest.raises(InputError, match="steps must be"):
        train_jepa(small(), digits("train"), steps=0)
