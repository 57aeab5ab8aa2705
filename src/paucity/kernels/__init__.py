"""The same function for every device: how it is computed fast, with the operator in `paucity.ops` as its reference."""
