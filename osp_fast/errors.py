"""The one exception that a user's mistake ends in, and the one place that prints it."""

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UserError(Exception):
    """Bad input. The message is one sentence that names the file, the field and the fix."""


def run_entry_point(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
