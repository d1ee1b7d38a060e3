"""Errors that say which argument is at fault, so that callers need not read their messages."""


class InputError(ValueError):
    """An input that the user can correct; the message says how."""


class ArgumentError(ValueError):
    """An invalid value of an argument.

    Args:
        message: names the argument, the value and the values that are allowed.
        argument: the argument's name; by default the one in backticks that begins the message.
        code: a word for the fault, for callers that treat it apart from others.
    """

    def __init__(self, message: str, argument: str = "", code: str = "invalid") -> None:
        super().__init__(message)
        self.argument, self.code = argument or _first_name(message), code


class ArgumentTypeError(TypeError):
    """A value of the wrong type. The arguments are those of `ArgumentError`."""

    def __init__(self, message: str, argument: str = "", code: str = "invalid") -> None:
        super().__init__(message)
        self.argument, self.code = argument or _first_name(message), code


class FolderInUseError(RuntimeError):
    """Another process or thread uses the folder of an argument; see `ArgumentError`."""

    def __init__(self, message: str, argument: str = "", code: str = "in_use") -> None:
        super().__init__(message)
        self.argument, self.code = argument or _first_name(message), code


class AllFailedError(RuntimeError):
    """Each part of a run failed; the message has the first reason."""


def _first_name(message: str) -> str:
    """The name in backticks that begins a message, if any."""
    return message.split("`")[1] if message.startswith("`") else ""
