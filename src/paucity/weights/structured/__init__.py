"""Structure removed from models: heads, neurons, experts and layers of language models, channels of ConvNets."""

from .layouts import find_units
from .shrinking import Shrunk, shrink
from .units import Units
from .zeroing import Zeroed, trim, zero

__all__ = ["Shrunk", "Units", "Zeroed", "find_units", "shrink", "trim", "zero"]
