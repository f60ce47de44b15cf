"""What pushes channels towards zero: one file per criterion, and the registry that knows them."""
