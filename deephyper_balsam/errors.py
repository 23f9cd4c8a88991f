"""One root error; each leaf is named for what the caller can do about it.

The command line maps them to exit codes: `InputError` 2, `BalsamError` 3.
Every message says what was got, what is allowed, and what to do next.
"""

from __future__ import annotations


class DeepHyperBalsamError(Exception):
    """Root of every error that this package raises on purpose."""


class InputError(DeepHyperBalsamError, ValueError):
    """What the caller gave cannot be used; nothing was changed. Mend the input and call again."""


class ProblemError(InputError):
    """The search space, a condition, a forbidden clause or a starting point is wrong."""


class TargetError(InputError):
    """A problem, run function or shell command could not be loaded from the target that was named."""


class SettingsError(InputError):
    """An option has an unknown name or a value that is not allowed."""


class SearchExistsError(InputError):
    """The name belongs to another search with other settings. Choose another name, or resume that search."""


class SearchRunningError(InputError):
    """Another driver is at work on the search. Stop it, or wait until it is known to be gone."""


class TakenOverError(DeepHyperBalsamError):
    """Another driver has taken over the search; this one stopped without changing anything more."""


class UnknownSearchError(InputError):
    """No search of that name is recorded in this Balsam."""


class NewerVersionError(InputError):
    """What Balsam holds was written by a later version of this package. Use that version; nothing was changed."""


class UnknownSiteError(InputError):
    """No such Balsam site, or no such site config."""


class TellError(InputError):
    """A result does not belong to the optimizer: an unknown number, or another value for a number that was told."""


class BrokenApplicationError(DeepHyperBalsamError):
    """The first trials all failed alike: mend the run function, or its environment on the nodes."""


class BalsamError(DeepHyperBalsamError):
    """Balsam could not do what was asked; trying again may help once the cause is gone."""


class UnreachableError(BalsamError):
    """Balsam's API does not answer. Trying again may help."""


class NotLoggedInError(BalsamError):
    """There are no credentials for Balsam, or they expired. Run `balsam login`."""


class BalsamChangedError(BalsamError):
    """The Balsam that is installed is not the one that this package fits. Install that one."""


class ServerError(BalsamError):
    """The embedded server could not be started or stopped; the message names the log."""
