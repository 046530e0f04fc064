"""The helper process: python -m pytest_nsbox.launcher LIFELINE-FD PARENT-PID OPTIONS."""

import json
import sys

from pytest_nsbox.launcher.janitor import Janitor
from pytest_nsbox.launcher.zygote import Zygote

zygote, janitor = Zygote.start(), Janitor.start()

# after the forks: this is most of what a child would have to copy
from pytest_nsbox.launcher.server import main  # noqa: E402

sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), zygote, janitor))
