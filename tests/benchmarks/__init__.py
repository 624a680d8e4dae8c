"""How fast episodes are played, against plain ways of playing them: `python -m tests.benchmarks --out bench.json`."""
