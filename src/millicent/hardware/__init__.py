"""What a machine is, and whether an edit will run on it: answered without torch, before anything is fetched."""
