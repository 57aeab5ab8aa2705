"""What a set of masks, or a model, has at zero, and what was counted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity asked for and reached, and what was counted.

    Attributes:
        nominal: the sparsity asked for; None where nobody said.
        achieved: ``num_zeros / num_parameters``, 0.0 without parameters.
        num_layers: parameters (tensors) counted; a tied one is one.
        num_parameters: entries of the counted layers.
        num_zeros: entries among them that are removed.
        layers: achieved sparsity of each counted layer by name.
        shapes: shape of each counted layer by name.
        num_model_parameters: entries of all parameters of the model, tied ones once; None where no model was given.
    """

    nominal: float | None
    achieved: float
    num_layers: int
    num_parameters: int
    num_zeros: int
    layers: dict[str, float]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_model_parameters: int | None = None

    @classmethod
    def count(
        cls,
        nominal: float | None,
        zeros: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        num_model_parameters: int | None,
    ) -> "SparsityReport":
        """The report of layers with ``zeros`` and ``shapes`` by name."""
        sizes = {name: math.prod(shapes[name]) for name in zeros}
        layers = {name: count / max(sizes[name], 1) for name, count in zeros.items()}
        total, removed = sum(sizes.values()), sum(zeros.values())
        kept = {name: tuple(shapes[name]) for name in zeros}
        return cls(nominal, removed / max(total, 1), len(zeros), total, removed, layers, kept, num_model_parameters)

    @property
    def of_model(self) -> float | None:
        """Removed entries over all parameters of the model: the zeros of layers that were not counted are not in it."""
        if self.num_model_parameters is None:
            return None
        return self.num_zeros / max(self.num_model_parameters, 1)

    def table(self) -> str:
        """The report as lines of text: each layer, their sum, and the share of the whole model where it is known."""
        rows = [("layer", "shape", "entries", "zeros", "sparsity")]
        for name, sparsity in self.layers.items():
            size = math.prod(self.shapes[name])
            shape = "x".join(map(str, self.shapes[name]))
            rows.append((name, shape, f"{size}", f"{round(sparsity * size)}", f"{sparsity:.2%}"))
        total = f"{self.num_layers} layers"
        rows.append((total, "", f"{self.num_parameters}", f"{self.num_zeros}", f"{self.achieved:.2%}"))
        if self.of_model is not None:
            whole = f"{self.num_model_parameters}"
            rows.append(("whole model", "", whole, f"{self.num_zeros}", f"{self.of_model:.2%}"))
        if self.nominal is not None:
            rows.append(("asked for", "", "", "", f"{self.nominal:.2%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for name, shape, *numbers in rows:
            cells = [name.ljust(widths[0]), shape.ljust(widths[1])]
            cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)
