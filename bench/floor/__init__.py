"""What no software can get under, and what is predicted from it."""
