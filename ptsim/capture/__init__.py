"""From a live module to network data."""
