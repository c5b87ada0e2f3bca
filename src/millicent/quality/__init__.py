"""Whether a picture may be delivered. Nothing here runs a network."""
