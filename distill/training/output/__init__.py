"""What a training run leaves on disk: its state to go on from, the students, their pictures and their card."""
