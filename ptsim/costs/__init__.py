"""What a network costs on a machine: pure functions over network and hardware."""
