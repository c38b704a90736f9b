# SPDX-License-Identifier: Apache-2.0
"""`python -m minference_vllm.cli`, for where the command is not on the path."""

import sys

from minference_vllm.cli import main

sys.exit(main())
