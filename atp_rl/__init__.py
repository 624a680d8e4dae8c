"""atp_rl: how alignment decays while an LLM agent learns from what pays, and what keeps it from decaying."""

__version__ = "0.1.0"
