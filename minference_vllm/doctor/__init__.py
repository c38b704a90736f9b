# SPDX-License-Identifier: Apache-2.0
"""Whether this installation, on this machine, for this model, would serve as it should: checks, each with a remedy."""
