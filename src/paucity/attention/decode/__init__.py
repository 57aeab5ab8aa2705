"""Decode policies: which cached keys a step with one token reads."""

from .oracle import OracleTopK
from .policy import DecodePolicy, Pages, Read

__all__ = ["DecodePolicy", "OracleTopK", "Pages", "Read"]
