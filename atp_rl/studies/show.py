"""A plan as lines of text: what `atp study --dry-run` prints."""

from __future__ import annotations

import math

from atp_rl.evaluate.contrasts import seeds_needed, smallest_flip_p
from atp_rl.evaluate.stats import LEVEL
from atp_rl.studies.file import Study
from atp_rl.studies.members import Job, Member, Plan
from atp_rl.tracking.league import PRIMARY


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


def too_few_seeds(study: Study) -> str | None:
    """Why no primary contrast of a study can become significant, and what would help; None where one can."""
    axes = (study.testbeds, study.models, *study.knobs.values())
    pairs, blocks, seeds = len(study.contrasts), math.prod(len(axis) or 1 for axis in axes), len(study.seeds)
    tests, smallest = PRIMARY * pairs * blocks, smallest_flip_p(seeds)
    if not tests or tests * smallest <= 1 - LEVEL:
        return None
    fixes = []
    if needed := seeds_needed(tests):
        fixes.append(f"take {needed} seeds or more")
    if possible := int((1 - LEVEL) / (PRIMARY * blocks * smallest)):
        fixes.append(f"name at most {possible} in `primary`")
    of = f"{PRIMARY} measures, contrasts: {pairs}" + (f", blocks: {blocks}" if blocks > 1 else "")
    fix = f"; {' or '.join(fixes)}" if fixes else ""
    return (
        f"no primary contrast can become significant with {seeds} seed{'s' * (seeds > 1)}: over {tests} tests ({of}) "
        f"the least p-value is {min(1.0, tests * smallest):.2g} after Holm's correction{fix}"
    )


def _what(job: Job) -> str:
    if job.complete:
        return "is complete"
    return "to resume" if job.begun else "to run"
