"""``python -m paucity``."""

from .cli import main

main()
