"""Length policies: how many tokens to draft before the target verifies."""
