"""The world that the demo model knows: colors, products, patterns, logos, and the edits that change one of them."""

COLORS = {
    "red": (214, 32, 38),
    "maroon": (112, 20, 38),
    "coral": (250, 118, 96),
    "orange": (245, 132, 24),
    "mustard yellow": (206, 158, 28),
    "yellow": (250, 218, 46),
    "olive": (112, 116, 38),
    "lime green": (148, 208, 48),
    "green": (38, 148, 66),
    "forest green": (22, 82, 50),
    "mint green": (158, 226, 190),
    "teal": (14, 124, 126),
    "turquoise": (58, 204, 204),
    "sky blue": (132, 196, 240),
    "blue": (34, 92, 214),
    "navy blue": (24, 36, 92),
    "purple": (112, 48, 160),
    "lavender": (192, 170, 232),
    "hot pink": (240, 48, 140),
    "pink": (248, 176, 196),
    "brown": (112, 68, 38),
    "beige": (222, 200, 166),
    "white": (246, 246, 246),
    "gray": (132, 134, 138),
    "black": (26, 26, 28),
}
COLOR_NAMES = tuple(COLORS)

# each class by the words that buyers use for it; "item" and "product" say any of them
ITEM_WORDS = {
    "t-shirt": ("t-shirt", "shirt", "tee", "top"),
    "hoodie": ("hoodie", "sweatshirt", "hooded top", "sweater"),
    "dress": ("dress", "gown", "frock", "summer dress"),
    "trousers": ("trousers", "pants", "slacks", "pair of pants"),
    "mug": ("mug", "cup", "coffee mug", "coffee cup"),
    "bag": ("bag", "tote bag", "tote", "shopping bag"),
    "sneaker": ("sneaker", "shoe", "trainer", "running shoe"),
    "cap": ("cap", "hat", "baseball cap", "baseball hat"),
}
ANY_ITEM = ("item", "product")
CLASSES = tuple(ITEM_WORDS)

PATTERNS = (("stripes", "striped"), ("polka dots", "dotted"), ("checks", "checkered"))
LOGOS = ("circle", "square", "star")

OPS = ("recolor", "background", "set_pattern", "remove_pattern", "add_logo", "remove_logo", "recolor_logo")
OP_SHARES = (0.26, 0.13, 0.21, 0.10, 0.14, 0.07, 0.09)
