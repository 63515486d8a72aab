"""The evaluation protocols, one file each: see `eval.protocol`."""
