# SPDX-License-Identifier: Apache-2.0
"""Hostile input to all that users hand to the plugin: settings, pattern files, files of `eval`, the command line."""
