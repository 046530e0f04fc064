"""The helper process: python -m pytest_nsbox.launcher LIFELINE-FD PARENT-PID OPTIONS.

What inits are forked from is started as soon as it can be: with all that is imported before it, a
fork has more to copy, and its end more to undo.
"""

import json
import signal
import sys

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel import userns
from pytest_nsbox.launcher.zygote import Zygote

# where the test process ignores it, so would this one, and could not wait for its children
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
early = Zygote.start() if userns.is_administrator() else None

from pytest_nsbox.launcher.janitor import Janitor  # noqa: E402
from pytest_nsbox.launcher.scope import enter_scope  # noqa: E402
from pytest_nsbox.launcher.standing import Standing, take_standing  # noqa: E402

refusal: UnsupportedError | None = None
standing = Standing()
no_scope = enter_scope(int(sys.argv[2]))
try:
    standing = take_standing()
except UnsupportedError as error:
    refusal = error
# these are in the user namespace, where there is one
zygote, janitor = early or Zygote.start(), Janitor.start()

from pytest_nsbox.kernel.netlink import import_only_messages  # noqa: E402

import_only_messages()
from pytest_nsbox.launcher.server import main  # noqa: E402

options = {**json.loads(sys.argv[3]), "no_scope": no_scope}
sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), options, refusal or standing, zygote, janitor))
