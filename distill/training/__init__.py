"""How a student is taught: recipes, losses, the loop, its checkpoints."""
