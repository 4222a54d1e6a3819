"""Programs to start your own from."""
