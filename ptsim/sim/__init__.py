"""A cluster that trains, simulated with SimPy."""
