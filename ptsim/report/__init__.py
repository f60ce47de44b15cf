"""Tidy frames, figures and the cost-breakdown page."""
