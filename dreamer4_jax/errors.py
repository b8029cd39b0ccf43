"""What the command line prints without a traceback."""


class UserError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with code 2."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot work, or an unknown preset, field or value."""
