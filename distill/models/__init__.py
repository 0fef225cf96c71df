"""What a model is, as data: families, depths, and which module of a student comes from which of its teacher."""
