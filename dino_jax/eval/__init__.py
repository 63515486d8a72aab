"""The paper's evaluations: `run.py` is the verb `eval`, `protocol.py` the record, `protocols/` has a file for each."""
