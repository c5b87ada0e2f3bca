"""Number formats: one file each, in plain PyTorch."""
