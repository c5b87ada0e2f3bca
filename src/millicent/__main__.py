"""`python -m millicent`."""

from millicent.cli.app import main

main()
