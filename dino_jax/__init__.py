"""DINO (self-distillation with no labels) for JAX."""

__version__ = "0.1.0"
