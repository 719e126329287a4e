"""The embedded model, the world that it was trained on, and the walk through every stage with it."""
