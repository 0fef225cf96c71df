"""Engines as the torch modules that diffusers and transformers expect: the same calls, outputs and configs, no weights."""
