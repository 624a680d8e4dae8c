"""A plan as lines of text: what `atp study --dry-run` prints."""

from __future__ import annotations

from atp_rl.studies.members import Job, Member, Plan


def plan_lines(plan: Plan) -> list[str]:
    """Every run, what would become of it, and what the study will test."""
    study, width = plan.study, max(len(job.name) for job in plan.jobs)
    of_members = f"{len(plan.members)} members, {len(plan.alignments)} alignments"
    lines = [f"study {study.name} in {plan.folder}: {of_members}"]
    for job in plan.jobs:
        start = f", from {job.alignment}" if isinstance(job, Member) and job.alignment else ""
        differs = f", differs in {', '.join(job.differs)}" if isinstance(job, Member) and job.differs else ""
        lines.append(f"  {job.name:{width}}  {_what(job)}{start}{differs}")
    contrasts = [f"{arm} against {reference}" for reference, arm in study.contrasts]
    return [*lines, f"primary contrasts: {', '.join(contrasts) or 'none'}"]


def _what(job: Job) -> str:
    if job.complete:
        return "is complete"
    return "to resume" if job.begun else "to run"
