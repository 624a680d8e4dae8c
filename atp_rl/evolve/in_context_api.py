"""Evolution in context of a model behind a chat service: nothing is loaded here, no weights change, no adapter is kept.

What `loop.evolve` comes to without a policy: the conversation grows round by round, and is measured once.
"""

from __future__ import annotations

from atp_rl import ranks
from atp_rl.evolve.setup import api_sampler, measure_checkpoint
from atp_rl.recipe import Recipe, check_defenses
from atp_rl.scenarios.suites import Suites
from atp_rl.tracking.progress import Report
from atp_rl.tracking.run import Run


def evolve_by_api(recipe: Recipe, run: Run, suites: Suites, *, report: Report) -> None:
    """Play and write the evaluation and its episodes; a run that was interrupted is played again from its start.

    Raises:
        InputError: the service stopped answering.
    """
    defenses = check_defenses(recipe.defenses, recipe.evolve)
    ranks.from_first(lambda: run.rewind(-1))
    measure_checkpoint(recipe, run, suites, None, api_sampler(recipe), defenses, step=0, report=report)
