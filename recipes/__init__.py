"""How the things that millicent ships were made."""
