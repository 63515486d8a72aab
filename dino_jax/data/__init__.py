"""Sources, crops and the input pipeline: NumPy, PIL and grain. Nothing here initializes a JAX backend."""
