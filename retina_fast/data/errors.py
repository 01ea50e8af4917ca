"""Errors that a person can put right. The command line prints them in one sentence, without a traceback."""


class UserError(ValueError):
    """Something is wrong with a file or an option. The message says what, where, and what to do."""


class ImageError(UserError):
    """An image file is missing or cannot be decoded. The message names it."""
