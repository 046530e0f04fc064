"""The helper process: python -m pytest_nsbox.launcher LIFELINE-FD PARENT-PID OPTIONS."""

import json
import signal
import sys

from pytest_nsbox.errors import UnsupportedError
from pytest_nsbox.kernel.netlink import import_only_messages
from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.launcher.scope import enter_scope
from pytest_nsbox.launcher.standing import Standing, take_standing
from pytest_nsbox.launcher.zygote import Zygote

# where the test process ignores it, so would this one, and could not wait for its children
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
refusal: UnsupportedError | None = None
standing = Standing()
no_scope = enter_scope(int(sys.argv[2]))
try:
    standing = take_standing()
except UnsupportedError as error:
    refusal = error
# these are in the user namespace, where there is one
zygote, janitor = Zygote.start(), Janitor.start()

# after the forks: this is most of what a child would have to copy
import_only_messages()
from pytest_nsbox.launcher.server import main  # noqa: E402

options = {**json.loads(sys.argv[3]), "no_scope": no_scope}
sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), options, refusal or standing, zygote, janitor))
