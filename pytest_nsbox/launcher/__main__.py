"""The helper process: python -m pytest_nsbox.launcher LIFELINE-FD PARENT-PID OPTIONS."""

import json
import sys

from pytest_nsbox.launcher.server import main

sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
