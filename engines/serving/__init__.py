"""A bundle inside Triton, and the load that measures it."""
