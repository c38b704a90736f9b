# SPDX-License-Identifier: Apache-2.0
"""Pictures of a choice: what each head kept for a prompt."""
