"""The kernels alone: each on one realistic size, its difference from dense, and its time beside dense.

Run: python examples/kernels.py
"""

import torch
import torch.nn.functional as F

from paucity.kernels import dispatch
from paucity.kernels.attention import sparse_attention
from paucity.kernels.codes import decode_codes
from paucity.kernels.decode import decode_attention
from paucity.kernels.linear import input_major, packed_linear, sparse_input_linear
from paucity.kernels.select import topk
from paucity.kernels.spmm import sparse_conv1x1
from paucity.measure.cost import time_interleaved
from paucity.ops.formats import BlockMask, Codes, PackedBitmask, PackedCSR
from paucity.ops.select import topk_mask

torch.manual_seed(0)
for name, fact in dispatch.status().items():
    print(f"{name:20} {fact}")


def show(name, ours, dense, exact):
    """Print how far ``ours`` is from ``exact``, relative to its largest entry, and how fast beside ``dense``."""
    with torch.no_grad():
        error = (ours().float() - exact().float()).abs().max() / exact().float().abs().max()
        speedup = time_interleaved({"dense": dense, "ours": ours}, repeats=7, warmup=2).speedup("ours")
    print(f"{name:48} error {error:.1e}   {speedup:5.1f}x dense")


print("\nkernel, and what it is compared with")

# Attention over 10 % of the blocks: each block of 128 queries sees its own keys and a few blocks before.
query, key, value = (torch.randn(1, 8, 4096, 64, dtype=torch.bfloat16) for _ in range(3))
blocks = torch.rand(1, 8, 32, 32) < 0.1
mask = BlockMask(blocks.tril() | torch.eye(32, dtype=torch.bool), 128, 128, 4096, 4096)
show(
    "attention, 10 % of the blocks, bf16",
    lambda: sparse_attention(query, key, value, mask),
    lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
    lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to_dense(causal=True)),
)

# Decoding: one new query reads 5 % of the pages of the cache.
cache_key, cache_value = (torch.randn(1, 8, 16384, 128, dtype=torch.bfloat16) for _ in range(2))
new = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16)
pages = torch.rand(1, 8, 512).topk(26).indices.int()
kept = torch.zeros(1, 8, 512, dtype=torch.bool).scatter(-1, pages.long(), True).repeat_interleave(32, -1)
show(
    "decode, 5 % of the pages, bf16",
    lambda: decode_attention(new, cache_key, cache_value, pages, page_size=32),
    lambda: F.scaled_dot_product_attention(new, cache_key, cache_value, enable_gqa=True),
    lambda: F.scaled_dot_product_attention(
        new, cache_key, cache_value, attn_mask=kept.repeat_interleave(4, 1)[:, :, None], enable_gqa=True
    ),
)

# Half of the inputs of a linear layer, then half of its weights.
x, weight = torch.randn(1, 4096), torch.randn(11008, 4096)
columns = input_major(weight)
show(
    "linear, the larger half of the inputs, fp32",
    lambda: sparse_input_linear(x, columns, k=2048),
    lambda: F.linear(x, weight),
    lambda: F.linear(x * topk_mask(x, k=2048, by_abs=True), weight),
)
pruned = (weight * topk_mask(weight, sparsity=0.5, by_abs=True)).bfloat16()
packed = PackedBitmask.pack(pruned)
show(
    "linear, half of the weights packed, bf16",
    lambda: packed_linear(x.bfloat16(), packed),
    lambda: F.linear(x.bfloat16(), pruned),
    lambda: F.linear(x, pruned.float()),
)

# The codes of a sparse autoencoder: choose 32 of 16,384 features, then decode them.
score, dictionary = torch.randn(2048, 16384), torch.randn(16384, 768)
show("top-k, 32 of 16,384", lambda: topk(score, 32)[0], lambda: score.topk(32)[0], lambda: score.topk(32)[0])
values, indices = topk(score, 32)
dense_codes = Codes(values, indices, 16384).to_dense()
show(
    "codes times a dictionary, 32 of 16,384",
    lambda: decode_codes(values, indices, dictionary),
    lambda: dense_codes @ dictionary,
    lambda: dense_codes @ dictionary,
)

# A 1x1 convolution with 90 % of its weights pruned.
image, kernel = torch.randn(1, 256, 56, 56), torch.randn(256, 256)
kernel *= topk_mask(kernel, sparsity=0.9, by_abs=True)
rows = PackedCSR.pack(kernel)
show(
    "1x1 convolution, 90 % sparse, fp32",
    lambda: sparse_conv1x1(image, rows),
    lambda: F.conv2d(image, kernel[..., None, None]),
    lambda: F.conv2d(image, kernel[..., None, None]),
)
