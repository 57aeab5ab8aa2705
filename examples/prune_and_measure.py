"""Prune the embedded model in Python, without a recipe, and see what each sparsity costs in bits per byte."""

from paucity import load
from paucity.measure.data import held_out_python, python_documents
from paucity.measure.quality import bits_per_byte
from paucity.models.calibration import calibration_batches
from paucity.weights import prune

text = held_out_python()
for sparsity in (0.0, 0.3, 0.6):
    loaded = load("embedded")
    calibration = calibration_batches(
        loaded.tokenizer, "\n".join(python_documents(include_tests=False)), num_samples=4, length=512
    )
    masks = prune(loaded, "wanda", sparsity=sparsity, calibration=calibration)
    quality = bits_per_byte(loaded.model, loaded.tokenizer, text, max_tokens=4096)
    print(f"sparsity {masks.sparsity().achieved:.2f}: {quality.bits_per_byte.value:.3f} bits per byte")
