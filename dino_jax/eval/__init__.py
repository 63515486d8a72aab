"""The paper's evaluations: `run.py` runs the verb `eval`; `protocols/` has one file per protocol."""
