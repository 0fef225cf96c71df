"""What all four rooms stand on: errors, files, progress, the hub."""
