"""The blind preference study: people choose between pictures of two models without knowing whose they are."""
