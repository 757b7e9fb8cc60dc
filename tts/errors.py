"""The one exception that is shown to a user as a sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the field, the value and the fix."""
