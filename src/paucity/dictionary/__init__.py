"""Dictionaries: sparse features of activations, learned, pursued or classical, on one contract."""
