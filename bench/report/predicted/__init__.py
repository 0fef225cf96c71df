"""Latencies that are predicted: of full-size models on any GPU, and of the students of a search."""
