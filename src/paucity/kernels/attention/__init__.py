"""Attention over the keys that a pattern keeps."""

from .reference import Pattern, as_key_lists, attention_recall, sparse_attention

__all__ = ["Pattern", "as_key_lists", "attention_recall", "sparse_attention"]
