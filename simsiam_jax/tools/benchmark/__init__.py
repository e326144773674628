"""Speed of the input and of the training step."""
