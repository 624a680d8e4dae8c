"""Defenses: what may keep an aligned policy aligned while it evolves. One file each, all behind one base class."""

from atp_rl.defenses.base import Defense, LossBatch, Probe, Setting
from atp_rl.defenses.gate import Gate
from atp_rl.defenses.kl_anchor import KLAnchor

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in (Gate, KLAnchor)}
"""Name in a recipe -> class. Its options are the dataclass's fields."""

__all__ = ["DEFENSES", "Defense", "Gate", "KLAnchor", "LossBatch", "Probe", "Setting"]
