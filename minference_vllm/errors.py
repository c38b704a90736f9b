# SPDX-License-Identifier: Apache-2.0
"""What is raised to the user."""


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the field, the value and what is allowed."""
