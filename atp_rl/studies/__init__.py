"""Studies: a file of arms, testbeds, models, knobs and seeds becomes named runs, which are started, resumed, listed.

`file` reads a study file, `members` makes its runs and checks them all, `record` keeps what became of each in the
study's directory, `local` runs them on this machine and `slurm` as a job array.
"""
