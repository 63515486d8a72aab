"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the file or key and says what to do; the CLI prints just that."""
