"""Training that prunes while it runs, and records what it did."""
