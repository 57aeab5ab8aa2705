"""Read a long prompt sparsely: install a policy, generate, look at what each head computed, and take it off again."""

import torch

from paucity import load
from paucity.attention.apply import apply
from paucity.attention.vertical_slash import VerticalSlash
from paucity.measure.data import held_out_python

loaded = load("embedded")
ids = loaded.tokenizer(held_out_python(), return_tensors="pt", truncation=True, max_length=2048).input_ids

applied = apply(loaded.model, VerticalSlash(vertical_share=0.05, slash_share=0.05))
with torch.no_grad():
    answer = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
print(loaded.tokenizer.decode(answer[0, -8:]))
print("density by layer and head:", applied.head_density().round(decimals=2).tolist(), sep="\n")
applied.remove()
