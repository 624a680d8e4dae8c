"""Defenses: what may keep an aligned policy aligned while it evolves. One file each, all behind one base class."""

from atp_rl.defenses.base import Defense, LossBatch, Probe, Setting
from atp_rl.defenses.gate import Gate
from atp_rl.defenses.inoculation import Inoculation
from atp_rl.defenses.kl_anchor import KLAnchor
from atp_rl.defenses.l2_anchor import EWC, L2Anchor
from atp_rl.defenses.lisa import Lisa
from atp_rl.defenses.merge_back import MergeBack
from atp_rl.defenses.replay import Replay, ShuffledReplay
from atp_rl.defenses.safe_lora import SafeLora
from atp_rl.defenses.surgery import Surgery
from atp_rl.defenses.token_constraint import TokenConstraint

DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        EWC,
        Gate,
        Inoculation,
        KLAnchor,
        L2Anchor,
        Lisa,
        MergeBack,
        Replay,
        SafeLora,
        ShuffledReplay,
        Surgery,
        TokenConstraint,
    )
}
"""Name in a recipe -> class. Its options are the dataclass's fields."""

__all__ = ["DEFENSES", "Defense", "Gate", "KLAnchor", "LossBatch", "Probe", "Setting"]
