"""What is measured: diffusers, compiled, optimum, a bundle, a fake."""
