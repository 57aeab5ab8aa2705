"""What the sums are; that of products in panels of columns of which those right of the diagonal are left out."""

from torch import Tensor

PANEL = 768


def add(gram: Tensor, inputs: Tensor) -> None:
    """``gram += X^T X`` in float32, on and below the diagonal."""
    inputs = inputs.float()
    for start in range(0, inputs.shape[1], PANEL):
        stop = min(start + PANEL, inputs.shape[1])
        gram[start:stop, :stop].addmm_(inputs[:, start:stop].T, inputs[:, :stop])


def add_squares(squares: Tensor, inputs: Tensor) -> None:
    """``squares += diag(X^T X)``, summed in float32 here and added in float64."""
    wide = inputs.float().square()
    # A product with ones: reducing the first dimension takes seven times as long.
    squares += (wide.new_ones(1, len(inputs)) @ wide)[0].to(squares)
