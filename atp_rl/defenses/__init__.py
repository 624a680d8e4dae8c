"""Defenses: what may keep an aligned policy aligned while it evolves. One file each, all behind one base class."""

from atp_rl.defenses.base import Defense, LossBatch, Probe, Setting
from atp_rl.defenses.covariance import Covariance
from atp_rl.defenses.drop_lone_violators import DropLoneViolators
from atp_rl.defenses.early_stop import EarlyStop
from atp_rl.defenses.gate import Gate
from atp_rl.defenses.interleave import Interleave
from atp_rl.defenses.kl_anchor import KLAnchor
from atp_rl.defenses.lagrangian import Lagrangian
from atp_rl.defenses.monitor import Monitor
from atp_rl.defenses.moving_anchor import MovingAnchor
from atp_rl.defenses.random_routing import RandomRouting

_ALL: tuple[type[Defense], ...] = (
    Covariance,
    DropLoneViolators,
    EarlyStop,
    Gate,
    Interleave,
    KLAnchor,
    Lagrangian,
    Monitor,
    MovingAnchor,
    RandomRouting,
)

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in _ALL}
"""Name in a recipe -> class. Its options are the dataclass's fields."""

__all__ = ["DEFENSES", "Defense", "Gate", "KLAnchor", "LossBatch", "Probe", "Setting"]
