"""Read cubes, windows for training, and predictions."""
