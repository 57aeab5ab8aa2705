"""Sparse attention on Hugging Face models: policies that choose what a prompt reads, and `apply` that installs one."""
