"""What a model is: architectures, checkpoints on disk, and the surgery between them."""
