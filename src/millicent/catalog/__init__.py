"""Catalog runs: a list of products and a recipe in, pictures and a ledger of what each one cost out."""
