"""Defenses: what may keep an aligned policy aligned while it evolves. One file each, all behind one base class."""

from atp_rl.defenses.audit_announcement import AuditAnnouncement
from atp_rl.defenses.base import Defense, LossBatch, Plan, Probe, Setting
from atp_rl.defenses.context_reset import ContextReset
from atp_rl.defenses.covariance import Covariance
from atp_rl.defenses.dissenters import Dissenters
from atp_rl.defenses.drop_lone_violators import DropLoneViolators
from atp_rl.defenses.early_stop import EarlyStop
from atp_rl.defenses.gate import Gate
from atp_rl.defenses.inoculation import Inoculation
from atp_rl.defenses.interleave import Interleave
from atp_rl.defenses.kl_anchor import KLAnchor
from atp_rl.defenses.l2_anchor import EWC, L2Anchor
from atp_rl.defenses.lagrangian import Lagrangian
from atp_rl.defenses.lisa import Lisa
from atp_rl.defenses.memory_filter import MemoryFilter
from atp_rl.defenses.merge_back import MergeBack
from atp_rl.defenses.monitor import Monitor
from atp_rl.defenses.moving_anchor import MovingAnchor
from atp_rl.defenses.neutral_text import NeutralText
from atp_rl.defenses.peer_hiding import PeerHiding
from atp_rl.defenses.random_routing import RandomRouting
from atp_rl.defenses.recitation import Recitation
from atp_rl.defenses.redaction import Redaction
from atp_rl.defenses.reflective_summary import ReflectiveSummary
from atp_rl.defenses.reminder import Reminder
from atp_rl.defenses.replay import Replay, ShuffledReplay
from atp_rl.defenses.safe_lora import SafeLora
from atp_rl.defenses.surgery import Surgery
from atp_rl.defenses.token_constraint import TokenConstraint
from atp_rl.defenses.window import Window

_ALL: tuple[type[Defense], ...] = (
    AuditAnnouncement,
    ContextReset,
    Covariance,
    Dissenters,
    DropLoneViolators,
    EarlyStop,
    EWC,
    Gate,
    Inoculation,
    Interleave,
    KLAnchor,
    L2Anchor,
    Lagrangian,
    Lisa,
    MemoryFilter,
    MergeBack,
    Monitor,
    MovingAnchor,
    NeutralText,
    PeerHiding,
    RandomRouting,
    Recitation,
    Redaction,
    ReflectiveSummary,
    Reminder,
    Replay,
    SafeLora,
    ShuffledReplay,
    Surgery,
    TokenConstraint,
    Window,
)

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in _ALL}
"""Name in a recipe -> class. Its options are the dataclass's fields."""

__all__ = ["DEFENSES", "Defense", "Gate", "KLAnchor", "LossBatch", "Plan", "Probe", "Setting"]
