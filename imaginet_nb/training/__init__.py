"""Learning: losses, gradient caching, the two stages."""
