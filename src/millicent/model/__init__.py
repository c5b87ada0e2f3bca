"""What the networks are, in plain PyTorch. Nothing here knows of files, devices or number formats."""
