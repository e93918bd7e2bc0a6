"""The Python API behind `addp_jax.load`."""
