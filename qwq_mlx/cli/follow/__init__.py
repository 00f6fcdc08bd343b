"""What `--hosts` starts for each rank but the first."""
