"""The one exception that means "the user can mend this"."""

from collections.abc import Iterable
from pathlib import Path

NAMED = 3  # files by which a cause is shown that many files share


class UserError(ValueError):
    """A mistake of the user's: says what was wrong, where, what was expected and what to do.

    The programs print its message without a traceback and exit with code 2.
    """


class FileError(UserError):
    """What is wrong with one file.

    Args:
        path: of the file.
        cause: what is wrong, in the same words for every file that has it.
        detail: what is special to this file, or empty.
        advice: what to do, or empty.
    """

    def __init__(self, path: Path, cause: str, detail: str = "", advice: str = "") -> None:
        self.path, self.cause, self.detail, self.advice = path, cause, detail, advice
        super().__init__(f"{path}: {cause}" + f" ({detail})" * bool(detail) + f"; {advice}" * bool(advice))


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def expanded(path: str | Path) -> Path:
    """A path as a user gave it, its ~ resolved.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder") from None


def by_cause(errors: Iterable[UserError]) -> list[str]:
    """One line for each cause: of many files that share one their number, `NAMED` names and what to do."""
    groups: dict[str, list] = {}
    for error in errors:
        groups.setdefault(error.cause if isinstance(error, FileError) else str(error), []).append(error)
    lines: list[str] = []
    for cause, some in groups.items():
        if len(some) <= NAMED or not isinstance(some[0], FileError):
            lines += map(str, some)
            continue
        names = [f"{one.path}" + f" ({one.detail})" * bool(one.detail) for one in some[:NAMED]]
        advice = f"; {some[0].advice}" * bool(some[0].advice)
        lines.append(f"{len(some)} files: {cause}{advice}. Such as {', '.join(names)}")
    return lines
