"""The demo model: drawn products, their edits, and the training of a tiny Qwen-Image-Edit on them."""
