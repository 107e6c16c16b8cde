"""The one kind of exception that is the user's to mend."""


class UserError(ValueError):
    """Something passed in cannot be used. The message names it and says what to do.

    Command lines print the message alone; any other exception is a defect and keeps its traceback.
    """
