"""The mini teacher: how it was taught, and how its pictures are judged."""
