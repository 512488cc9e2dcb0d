"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake of the user's: says what was wrong, where, what was expected and what to do.

    The programs print its message without a traceback and exit with code 2.
    """
