"""The one exception that a user may see."""


class UserError(Exception):
    """Something the user can put right: a missing file, a wrong key, a tokenizer that does not match.

    Its message is one or two plain sentences that say what is wrong and what to do. Commands print it and exit with 1;
    every other exception is a bug and keeps its traceback.
    """
