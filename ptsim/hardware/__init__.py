"""What GPUs, links and clusters are, as data."""
