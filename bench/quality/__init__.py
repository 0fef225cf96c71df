"""Whether a faster model still draws the same picture."""
