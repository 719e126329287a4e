"""What is cut, as plain data: plans, the recipes that carry them, and the history that a checkpoint tells. Pure."""
