"""The same gamma in every round; 0 is the target alone."""

from controllers.plain import Plain


class Fixed(Plain):
    """Draft ``cap`` tokens, always."""
