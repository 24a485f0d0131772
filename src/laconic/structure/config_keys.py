"""Keys of config.json for models whose blocks differ in width (`structure.widths`)."""

MODEL_TYPE = "laconic"
"""Value of `model_type`."""

BASE = "laconic_base"
"""Key of the stock model's type."""

WIDTHS = "laconic_widths"
"""Key of the widths: for each block, the config keys that have a value of their own there."""
