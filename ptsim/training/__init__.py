"""Training runs that record themselves."""
