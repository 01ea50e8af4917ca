"""What a person can put right: the command line prints these in one sentence, without a traceback."""


class UserError(ValueError):
    """Something is wrong with a file or an option; the message says what, where, and what to do."""


class ImageError(UserError):
    """An image file that is missing or cannot be decoded; the message names it."""
