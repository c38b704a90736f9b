# SPDX-License-Identifier: Apache-2.0
"""Pictures of what each head kept for a prompt."""
