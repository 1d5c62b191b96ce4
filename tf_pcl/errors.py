"""What a user asked wrongly, said in one line."""
import difflib


class UserError(ValueError):
    """Something asked that cannot be done; its text says what came, what is allowed and what to do."""


def choose(what, name, allowed):
    """Returns `name` if it is one of `allowed`; raises UserError with the nearest match otherwise."""
    if name in allowed:
        return name
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"{what} {name!r} is not known.{hint} Allowed: {', '.join(sorted(allowed))}.")


def one_line(error):
    """What an exception says, with its type, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}" if text else type(error).__name__
