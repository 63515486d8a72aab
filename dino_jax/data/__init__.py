"""Sources, crops and the input pipeline: NumPy, PIL and grain. Nothing here initialises a JAX backend."""
