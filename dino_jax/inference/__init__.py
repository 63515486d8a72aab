"""Weights put to use: `model.load` returns a `Model` with `preprocess` and `features`."""
