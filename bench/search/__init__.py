"""The best student for a latency: what it may leave out, what that saves, and what it costs in quality."""
