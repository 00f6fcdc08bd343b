"""What the commands share: flags, the terminal and signals."""
