"""These tests are about a machine of a kind: ci/v2 and ci/engines make it, and run them there."""

import os

collect_ignore_glob = [] if "NSBOX_LANE" in os.environ else ["test_*.py"]
