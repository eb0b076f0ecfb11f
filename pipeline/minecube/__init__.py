"""minecube."""
