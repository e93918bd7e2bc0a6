"""ADDP in JAX: alternating pixel-token diffusion for generation and recognition."""

__version__ = "0.1.0"
