# SPDX-License-Identifier: Apache-2.0
"""What a server does when something breaks under it, with the plugin and without."""
