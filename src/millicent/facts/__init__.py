"""What is known about models, as TOML files read into frozen dataclasses; standard library only."""
