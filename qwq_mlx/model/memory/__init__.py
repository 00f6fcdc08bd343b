"""What a run needs in memory, planned before a weight is read, and whether it fits."""
