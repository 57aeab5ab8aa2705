"""Decode policies: which cached keys a step with one token reads."""

from .oracle import OracleTopK
from .policy import DecodePolicy, Pages, Read
from .quest import Quest
from .tidal import Tidal

__all__ = ["DecodePolicy", "OracleTopK", "Pages", "Quest", "Read", "Tidal"]
